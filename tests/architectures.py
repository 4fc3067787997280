"""Tiny models of many architectures, built from transformers' own configurations, with a batch each.

`fused` says which output columns of a fused weight are q, k and v (or gate and up), written as the lines of the
model's forward that take the output apart, applied to the column numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES, TOKENS, VOCAB = 3, 24, 96
HIDDEN, INNER, HEADS, KV_HEADS = 32, 48, 4, 2
WIDTH = HIDDEN // HEADS

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model and what the table test needs to know about it.

    Attributes:
        build: Makes the model.
        batch: Makes its inputs.
        fused: Leaf name to a function from the number of columns to each part's columns.
        kwargs: Arguments of `score`.
        types: How many types it must have, as a check that the right layers were found.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    types: int
    fused: dict[str, Callable[[int], Columns]] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)


def text_batch() -> dict[str, Tensor]:
    """The first sample left-padded, the second right-padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB - 8, (SAMPLES, TOKENS), generator=generator)
    mask = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, 20:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image_batch() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(SAMPLES, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def t5_batch() -> dict[str, Tensor]:
    return {**text_batch(), "decoder_input_ids": text_batch()["input_ids"][:, :9]}


def whisper_batch() -> dict[str, Tensor]:
    features = torch.randn(SAMPLES, 8, 40, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": text_batch()["input_ids"][:, :9]}


def llava_batch() -> dict[str, Tensor]:
    ids = text_batch()["input_ids"]
    ids[:, 5:9] = VOCAB - 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image_batch()}


def qwen2_vl_batch() -> dict[str, Tensor]:
    ids = text_batch()["input_ids"]
    ids[:, 4], ids[:, 5:9], ids[:, 9] = VOCAB - 3, VOCAB - 1, VOCAB - 4
    types = torch.zeros_like(ids)
    types[:, 5:9] = 1
    pixels = torch.randn(SAMPLES * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * SAMPLES),
        "mm_token_type_ids": types,
    }


_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_local_experts": 4, "num_experts": 4}
_GPT = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 64}
_VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 8,
}


def from_config(model: str, config: str, /, **fields: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return finished(getattr(transformers, model)(getattr(transformers, config)(**fields)))

    return build


def llava() -> nn.Module:
    import transformers

    vision = transformers.CLIPVisionConfig(**_VISION, projection_dim=HIDDEN)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config=vision,
        image_token_id=VOCAB - 1,
        vision_feature_layer=-1,
    )
    return finished(transformers.LlavaForConditionalGeneration(config))


def qwen2_vl() -> nn.Module:
    import transformers

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 4, "mlp_ratio": 2, "in_channels": 3}
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    )
    return finished(transformers.Qwen2VLForConditionalGeneration(config))


def finished(model: nn.Module) -> nn.Module:
    """Seeded weights far from the identity, and biases that would show if they counted."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.float().eval()


def concatenated(*sizes: int) -> Callable[[int], Columns]:
    names = ("q", "k", "v") if len(sizes) == 3 else ("gate", "up")
    return lambda columns: dict(zip(names, torch.arange(columns).split(sizes), strict=True))


def head_by_head(columns: int) -> Columns:
    q, k, v = torch.arange(columns).view(HEADS, 3 * WIDTH).chunk(3, dim=-1)
    return {"q": q.flatten(), "k": k.flatten(), "v": v.flatten()}


def falcon_new(columns: int) -> Columns:
    qkv = torch.arange(columns).view(-1, HEADS // KV_HEADS + 2, WIDTH)
    return {"q": qkv[:, :-2].flatten(), "k": qkv[:, [-2]].flatten(), "v": qkv[:, [-1]].flatten()}


def codegen(columns: int) -> Columns:
    q, v, k = torch.arange(columns).view(4, -1).split(columns // 12, dim=-1)
    return {"q": q.flatten(), "v": v.flatten(), "k": k.flatten()}


_THIRDS = concatenated(HIDDEN, HIDDEN, HIDDEN)
_GROUPED = concatenated(HIDDEN, KV_HEADS * WIDTH, KV_HEADS * WIDTH)
_FALCON = {key: value for key, value in _TEXT.items() if key not in ("num_key_value_heads", "intermediate_size")}
_PLAIN = {key: value for key, value in _TEXT.items() if key != "num_key_value_heads"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(from_config("LlamaForCausalLM", "LlamaConfig", **_TEXT), text_batch, 7),
    "qwen2": Architecture(from_config("Qwen2ForCausalLM", "Qwen2Config", **_TEXT), text_batch, 7),
    "qwen3": Architecture(from_config("Qwen3ForCausalLM", "Qwen3Config", **_TEXT, head_dim=WIDTH), text_batch, 7),
    "gemma3": Architecture(
        from_config("Gemma3ForCausalLM", "Gemma3TextConfig", **_TEXT, head_dim=WIDTH, sliding_window=8), text_batch, 7
    ),
    "phi3": Architecture(
        from_config("Phi3ForCausalLM", "Phi3Config", **_TEXT),
        text_batch,
        7,
        {"qkv_proj": _GROUPED, "gate_up_proj": concatenated(INNER, INNER)},
    ),
    "glm": Architecture(
        from_config("GlmForCausalLM", "GlmConfig", **_TEXT, head_dim=WIDTH),
        text_batch,
        7,
        {"gate_up_proj": concatenated(INNER, INNER)},
    ),
    "gpt2": Architecture(
        from_config("GPT2LMHeadModel", "GPT2Config", **_GPT, bos_token_id=1, eos_token_id=2),
        text_batch,
        6,
        {"c_attn": _THIRDS},
    ),
    "gpt_bigcode": Architecture(
        from_config("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **_GPT, multi_query=True),
        text_batch,
        6,
        {"c_attn": concatenated(HIDDEN, WIDTH, WIDTH)},
    ),
    "gpt_bigcode_mha": Architecture(
        from_config("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **_GPT, multi_query=False),
        text_batch,
        6,
        {"c_attn": head_by_head},
    ),
    "codegen": Architecture(
        from_config("CodeGenForCausalLM", "CodeGenConfig", **_GPT, rotary_dim=4),
        text_batch,
        6,
        {"qkv_proj": codegen},
    ),
    "gpt_neox": Architecture(
        from_config("GPTNeoXForCausalLM", "GPTNeoXConfig", **_PLAIN), text_batch, 6, {"query_key_value": head_by_head}
    ),
    "falcon": Architecture(
        from_config("FalconForCausalLM", "FalconConfig", **_FALCON, multi_query=True),
        text_batch,
        6,
        {"query_key_value": concatenated(HIDDEN, WIDTH, WIDTH)},
    ),
    "falcon_mha": Architecture(
        from_config("FalconForCausalLM", "FalconConfig", **_FALCON, multi_query=False),
        text_batch,
        6,
        {"query_key_value": head_by_head},
    ),
    "falcon_new": Architecture(
        from_config(
            "FalconForCausalLM", "FalconConfig", **_FALCON, new_decoder_architecture=True, num_kv_heads=KV_HEADS
        ),
        text_batch,
        6,
        {"query_key_value": falcon_new},
    ),
    "mpt": Architecture(
        from_config(
            "MptForCausalLM", "MptConfig", vocab_size=VOCAB, d_model=HIDDEN, n_heads=HEADS, n_layers=2, max_seq_len=64
        ),
        text_batch,
        6,
        {"Wqkv": _THIRDS},
    ),
    "bloom": Architecture(
        from_config("BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=2, n_head=HEADS),
        text_batch,
        6,
        {"query_key_value": head_by_head},
    ),
    "opt": Architecture(
        from_config("OPTForCausalLM", "OPTConfig", **_PLAIN, ffn_dim=INNER, word_embed_proj_dim=HIDDEN),
        text_batch,
        6,
    ),
    "bert": Architecture(from_config("BertForSequenceClassification", "BertConfig", **_PLAIN), text_batch, 6),
    "modernbert": Architecture(
        from_config("ModernBertForMaskedLM", "ModernBertConfig", **_PLAIN, attn_implementation="eager"),
        text_batch,
        7,
        {"Wqkv": _THIRDS, "Wi": concatenated(INNER, INNER)},
    ),
    "vit": Architecture(from_config("ViTForImageClassification", "ViTConfig", **_VISION), image_batch, 6),
    "whisper": Architecture(
        from_config(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=VOCAB,
            d_model=HIDDEN,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=INNER,
            decoder_ffn_dim=INNER,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        whisper_batch,
        16,
    ),
    "t5": Architecture(
        from_config(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=WIDTH,
            d_ff=INNER,
            num_layers=2,
            num_heads=HEADS,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        ),
        t5_batch,
        18,
    ),
    "mamba": Architecture(
        from_config(
            "MambaForCausalLM", "MambaConfig", vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=8
        ),
        text_batch,
        3,
    ),
    "mamba2": Architecture(
        from_config(
            "Mamba2ForCausalLM",
            "Mamba2Config",
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=2,
            chunk_size=8,
        ),
        text_batch,
        2,
    ),
    "mixtral": Architecture(
        from_config("MixtralForCausalLM", "MixtralConfig", **_TEXT, num_local_experts=4, num_experts_per_tok=2),
        text_batch,
        7,
    ),
    "qwen3_moe": Architecture(
        from_config("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_TEXT, **_EXPERTS, head_dim=WIDTH), text_batch, 7
    ),
    "olmoe": Architecture(
        from_config("OlmoeForCausalLM", "OlmoeConfig", **_TEXT, num_experts=4, num_experts_per_tok=2), text_batch, 7
    ),
    "gpt_oss": Architecture(
        from_config(
            "GptOssForCausalLM",
            "GptOssConfig",
            **_TEXT,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=WIDTH,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        text_batch,
        7,
    ),
    "deepseek_v3": Architecture(
        from_config(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            **{**_TEXT, "num_key_value_heads": HEADS, "num_hidden_layers": 3},
            moe_intermediate_size=24,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=2,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        text_batch,
        14,
    ),
    "llava": Architecture(llava, llava_batch, 7),
    "llava_vision": Architecture(llava, llava_batch, 6, kwargs={"scope": "vision"}),
    "qwen2_vl": Architecture(qwen2_vl, qwen2_vl_batch, 7),
    "qwen2_vl_vision": Architecture(qwen2_vl, qwen2_vl_batch, 6, {"qkv": _THIRDS}, kwargs={"scope": "vision"}),
}
