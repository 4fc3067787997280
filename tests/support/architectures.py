"""Tiny models of many architectures, built from transformers' own configurations, with a batch each.

Their inputs and the column layouts of their packed weights are in `tests.support.architecture_parts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tests.support.architecture_parts import (
    EXPERTS,
    GPT,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    PLAIN,
    TEXT,
    VISION,
    VOCAB,
    WIDTH,
    Columns,
    clip,
    codegen,
    concatenated,
    falcon_new,
    from_config,
    head_by_head,
    image_batch,
    llava,
    llava_batch,
    qwen2_vl,
    qwen2_vl_batch,
    t5_batch,
    text_batch,
    whisper_batch,
)


@dataclass(frozen=True)
class Architecture:
    """A model and what the table test needs to know about it.

    Attributes:
        build: Makes the model.
        batch: Makes its inputs.
        packed: Leaf name to a function from the number of columns to each part's columns.
        kwargs: Arguments of `score`.
        types: How many types must compete for LoRA, as a check that the right layers were found.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    types: int
    packed: dict[str, Callable[[int], Columns]] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)


_FALCON = {key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "intermediate_size")}
_THIRDS = concatenated(HIDDEN, HIDDEN, HIDDEN)
_GROUPED = concatenated(HIDDEN, KV_HEADS * WIDTH, KV_HEADS * WIDTH)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(from_config("LlamaForCausalLM", "LlamaConfig", **TEXT), text_batch, 7),
    "qwen2": Architecture(from_config("Qwen2ForCausalLM", "Qwen2Config", **TEXT), text_batch, 7),
    "qwen3": Architecture(from_config("Qwen3ForCausalLM", "Qwen3Config", **TEXT, head_dim=WIDTH), text_batch, 7),
    "gemma3": Architecture(
        from_config("Gemma3ForCausalLM", "Gemma3TextConfig", **TEXT, head_dim=WIDTH, sliding_window=8), text_batch, 7
    ),
    "phi3": Architecture(
        from_config("Phi3ForCausalLM", "Phi3Config", **TEXT),
        text_batch,
        7,
        {"qkv_proj": _GROUPED, "gate_up_proj": concatenated(INNER, INNER)},
    ),
    "glm": Architecture(
        from_config("GlmForCausalLM", "GlmConfig", **TEXT, head_dim=WIDTH),
        text_batch,
        7,
        {"gate_up_proj": concatenated(INNER, INNER)},
    ),
    "gpt2": Architecture(
        from_config("GPT2LMHeadModel", "GPT2Config", **GPT, bos_token_id=1, eos_token_id=2),
        text_batch,
        6,
        {"c_attn": _THIRDS},
    ),
    "gpt_bigcode": Architecture(
        from_config("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **GPT, multi_query=True),
        text_batch,
        6,
        {"c_attn": concatenated(HIDDEN, WIDTH, WIDTH)},
    ),
    "gpt_bigcode_mha": Architecture(
        from_config("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **GPT, multi_query=False),
        text_batch,
        6,
        {"c_attn": head_by_head},
    ),
    "codegen": Architecture(
        from_config("CodeGenForCausalLM", "CodeGenConfig", **GPT, rotary_dim=4),
        text_batch,
        6,
        {"qkv_proj": codegen},
    ),
    "gpt_neox": Architecture(
        from_config("GPTNeoXForCausalLM", "GPTNeoXConfig", **PLAIN), text_batch, 6, {"query_key_value": head_by_head}
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
        from_config("OPTForCausalLM", "OPTConfig", **PLAIN, ffn_dim=INNER, word_embed_proj_dim=HIDDEN),
        text_batch,
        6,
    ),
    "bert": Architecture(from_config("BertForSequenceClassification", "BertConfig", **PLAIN), text_batch, 6),
    "modernbert": Architecture(
        from_config("ModernBertForMaskedLM", "ModernBertConfig", **PLAIN, attn_implementation="eager"),
        text_batch,
        7,
        {"Wqkv": _THIRDS, "Wi": concatenated(INNER, INNER)},
    ),
    "vit": Architecture(from_config("ViTForImageClassification", "ViTConfig", **VISION), image_batch, 6),
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
        1,
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
        1,
    ),
    "mixtral": Architecture(
        from_config("MixtralForCausalLM", "MixtralConfig", **TEXT, num_local_experts=4, num_experts_per_tok=2),
        text_batch,
        7,
    ),
    "qwen3_moe": Architecture(
        from_config("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **TEXT, **EXPERTS, head_dim=WIDTH), text_batch, 7
    ),
    "olmoe": Architecture(
        from_config("OlmoeForCausalLM", "OlmoeConfig", **TEXT, num_experts=4, num_experts_per_tok=2), text_batch, 7
    ),
    "gpt_oss": Architecture(
        from_config(
            "GptOssForCausalLM",
            "GptOssConfig",
            **TEXT,
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
            **{**TEXT, "num_key_value_heads": HEADS, "num_hidden_layers": 3},
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
    "qwen2_moe": Architecture(
        from_config("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **TEXT, **EXPERTS, shared_expert_intermediate_size=24),
        text_batch,
        10,
    ),
    "glm4_moe": Architecture(
        from_config(
            "Glm4MoeForCausalLM",
            "Glm4MoeConfig",
            **TEXT,
            moe_intermediate_size=24,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            head_dim=WIDTH,
        ),
        text_batch,
        13,
    ),
    "phimoe": Architecture(
        from_config("PhimoeForCausalLM", "PhimoeConfig", **TEXT, num_local_experts=4, num_experts_per_tok=2),
        text_batch,
        7,
    ),
    "jamba": Architecture(
        from_config(
            "JambaForCausalLM",
            "JambaConfig",
            **{**TEXT, "num_hidden_layers": 4},
            num_experts=4,
            num_experts_per_tok=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        text_batch,
        13,
    ),
    "qwen3_next": Architecture(
        from_config(
            "Qwen3NextForCausalLM",
            "Qwen3NextConfig",
            **TEXT,
            **EXPERTS,
            head_dim=WIDTH,
            shared_expert_intermediate_size=24,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        text_batch,
        12,
    ),
    "falcon_h1": Architecture(
        from_config(
            "FalconH1ForCausalLM",
            "FalconH1Config",
            **TEXT,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_chunk_size=8,
            head_dim=WIDTH,
        ),
        text_batch,
        8,
    ),
    "llama4": Architecture(
        from_config(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            **TEXT,
            intermediate_size_mlp=INNER,
            num_local_experts=4,
            num_experts_per_tok=1,
            head_dim=WIDTH,
            attention_chunk_size=16,
        ),
        text_batch,
        7,
    ),
    "albert": Architecture(
        from_config("AlbertModel", "AlbertConfig", **{**PLAIN, "num_hidden_layers": 3}, embedding_size=16),
        text_batch,
        6,
    ),
    "clip": Architecture(clip, lambda: {**text_batch(), **image_batch()}, 6),
    "resnet": Architecture(
        from_config("ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        image_batch,
        2,
    ),
}
