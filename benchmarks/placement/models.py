"""The decoders: their shapes, which of them may be fitted on, and how to run their blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.placement import experts

TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = TYPES[:4]
MLP = TYPES[4:]


@dataclass(frozen=True)
class Shape:
    """One decoder.

    Attributes:
        family: `"llama"`, `"qwen2"` (biases on q, k, v), `"qwen3"` (norms on the heads of q and k) or `"qwen3_moe"`.
        hidden: Width of the residual stream.
        layers: Blocks.
        heads: Query heads.
        kv_heads: Key and value heads.
        mlp: Width inside the MLP, or of each expert.
        tokens: Length of pretraining.
        held_out: Whether rules may only be tested on it.
        experts: Experts of each MLP, of which two are used for a token; 0: an ordinary MLP.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    tokens: int
    held_out: bool = False
    experts: int = 0


MODELS = {
    "llama-base": Shape("llama", 512, 8, 8, 8, 1408, 100_000_000),
    "llama-wide": Shape("llama", 768, 4, 12, 12, 1792, 100_000_000),
    "llama-gqa": Shape("llama", 512, 9, 8, 2, 1408, 100_000_000),
    "qwen2-bias": Shape("qwen2", 576, 7, 9, 3, 1536, 100_000_000),
    "llama-100m": Shape("llama", 768, 14, 12, 12, 2048, 400_000_000),
    "llama-deep": Shape("llama", 384, 14, 6, 6, 1024, 100_000_000, held_out=True),
    "qwen3-norm": Shape("qwen3", 512, 9, 8, 4, 1408, 100_000_000, held_out=True),
    "qwen3-moe": Shape("qwen3_moe", 512, 5, 8, 8, 352, 100_000_000, held_out=True, experts=8),
    "qwen3-100m": Shape("qwen3", 768, 15, 12, 4, 2304, 400_000_000, held_out=True),
}

SMOKE_MODELS = {
    "llama-smoke": Shape("llama", 32, 2, 4, 2, 48, 1_024),
    "qwen2-smoke": Shape("qwen2", 32, 2, 4, 4, 48, 1_024),
    "qwen3-smoke": Shape("qwen3", 32, 2, 4, 2, 48, 1_024, held_out=True),
    "moe-smoke": Shape("qwen3_moe", 32, 2, 4, 2, 24, 1_024, held_out=True, experts=4),
}


def build(shape: Shape, vocabulary: int, seed: int = 0) -> nn.Module:
    """A decoder with random float32 weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sparse = {"num_experts": shape.experts, "num_experts_per_tok": 2, "moe_intermediate_size": shape.mlp}
    config = AutoConfig.for_model(
        shape.family,
        **(sparse if shape.experts else {}),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        intermediate_size=shape.mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        initializer_range=0.02,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    if shape.experts:
        experts.unfuse(model)
    return model


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The adaptable modules by full name, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TYPES and isinstance(module, nn.Linear)
    }


def type_of(name: str) -> str:
    """The module type in a full name."""
    return name.rpartition(".")[2]


def type_means(values: Mapping[str, float]) -> dict[str, float]:
    """The mean of a module's score over the modules of each type."""
    groups: dict[str, list[float]] = {each: [] for each in TYPES}
    for module, value in values.items():
        groups[type_of(module)].append(value)
    return {each: sum(group) / len(group) for each, group in groups.items()}


def layer_of(name: str) -> int:
    """The number of the block in a full name."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def blocks_of(model: Any, compiled: bool) -> list[Callable[..., Tensor]]:
    """The decoder blocks, each compiled by itself: equal blocks share one program."""
    return [torch.compile(layer, dynamic=False) if compiled else layer for layer in model.model.layers]


def hidden_states(model: Any, blocks: Sequence[Callable[..., Tensor]], tokens: Tensor) -> Tensor:
    """What the head of `model` reads for `tokens` [B, T] -> [B, T, K].

    Causal attention without a mask: padding at the end of a row changes nothing before it, and nothing here waits for
    the device, so that a CUDA graph can hold it.
    """
    decoder = model.model
    states = decoder.embed_tokens(tokens)
    if torch.is_grad_enabled() and not states.requires_grad:
        states.requires_grad_()  # so that the first block compiles to the program of the others
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    rotary = decoder.rotary_emb(states, position_ids=positions)
    for block in blocks:
        states = block(states, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    result: Tensor = decoder.norm(states)
    return result
