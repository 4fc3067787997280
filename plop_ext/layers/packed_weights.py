"""Packed weights of supported architectures (q, k and v, or gate and up), and the layout of their outputs.

The layout of a packed weight is defined by the code of the forward that splits its output. Each entry below restates
that code. A packed weight of another architecture is scored as a single matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from plop_ext.layers.split import Split

QKV = ("q", "k", "v")

Layout = Callable[[Any, int], Split | None]


def _heads(config: Any) -> tuple[int, int, int]:
    """Return query heads, key-value heads and head width."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _grouped_query(config: Any, out_features: int) -> Split:
    """Return the layout [q of all heads | k | v]."""
    heads, kv_heads, width = _heads(config)
    return Split(QKV, (heads * width, kv_heads * width, kv_heads * width))


def _thirds(config: Any, out_features: int) -> Split:
    """Return the layout [q | k | v] of equal widths."""
    return Split(QKV, (out_features // 3,) * 3)


def _head_by_head(config: Any, out_features: int) -> Split:
    """Return the layout [q0 k0 v0 q1 k1 v1 ...], head by head."""
    return Split(QKV, (out_features // (3 * config.num_attention_heads),) * 3)


def _falcon(config: Any, out_features: int) -> Split:
    width = config.hidden_size // config.num_attention_heads
    if config.new_decoder_architecture:  # per key-value head: its query heads, then k, then v
        per_group = config.num_attention_heads // config.num_kv_heads
        return Split(QKV, (per_group * width, width, width))
    if config.multi_query:
        return Split(QKV, (config.hidden_size, width, width))
    return _head_by_head(config, out_features)


def _gpt2(config: Any, out_features: int) -> Split:
    """Return the layout [q | k | v], or [k | v] of a cross-attention."""
    names = QKV if out_features == 3 * config.hidden_size else QKV[1:]
    return Split(names, (config.hidden_size,) * len(names))


def _gpt_bigcode(config: Any, out_features: int) -> Split:
    width = config.hidden_size // config.num_attention_heads
    return (
        Split(QKV, (config.hidden_size, width, width)) if config.multi_query else _head_by_head(config, out_features)
    )


def _codegen(config: Any, out_features: int) -> Split:
    """Return the layout of four blocks of [q | v | k], which stem from tensor parallelism."""
    return Split(("q", "v", "k"), (out_features // 12,) * 3)


def _dbrx(config: Any, out_features: int) -> Split:
    kv = config.attn_config.kv_n_heads * (config.d_model // config.n_heads)
    return Split(QKV, (config.d_model, kv, kv))


def _gate_up(config: Any, out_features: int) -> Split:
    return Split(("gate", "up"), (out_features // 2,) * 2)


# (model_type of the configuration that the module was built from, leaf name) to layout.
_LAYOUTS: dict[tuple[str, str], Layout] = {
    ("phi3", "qkv_proj"): _grouped_query,
    ("phi4_multimodal", "qkv_proj"): _grouped_query,
    ("gpt_neox", "query_key_value"): _head_by_head,
    ("gpt_neox_japanese", "query_key_value"): _head_by_head,
    ("bloom", "query_key_value"): _head_by_head,
    ("persimmon", "query_key_value"): _head_by_head,
    ("falcon", "query_key_value"): _falcon,
    ("mpt", "Wqkv"): _thirds,
    ("modernbert", "Wqkv"): _thirds,
    ("dbrx", "Wqkv"): _dbrx,
    ("gpt2", "c_attn"): _gpt2,
    ("gpt_bigcode", "c_attn"): _gpt_bigcode,
    ("codegen", "qkv_proj"): _codegen,
    # ModernBERT's GLU applies the activation to its first half, which is the gate.
    ("modernbert", "Wi"): _gate_up,
    **{
        (model_type, "gate_up_proj"): _gate_up
        for model_type in ("phi3", "phi4_multimodal", "glm", "glm4", "glm4v_text", "glm_image_text", "glm_ocr_text")
    },
    **{
        (model_type, "qkv"): _thirds
        for model_type in (
            "qwen2_vl",
            "qwen2_vl_vision",
            "qwen2_5_vl",
            "qwen2_5_vl_vision",
            "qwen3_vl",
            "qwen3_vl_vision",
        )
    },
}


def split_for(config: Any, name: str, out_features: int) -> Split | None:
    """Return the layout of module `name`'s outputs, if it is a packed weight of a supported architecture.

    Args:
        config: The configuration of the nearest enclosing module that has one, or None.
        name: Full module name.
        out_features: M.
    """
    layout = _LAYOUTS.get((getattr(config, "model_type", ""), name.rsplit(".", 1)[-1]))
    if layout is None:
        return None
    split = layout(config, out_features)
    if split is None or not split.fits(out_features):
        return None
    return split
