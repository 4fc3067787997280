"""Where the rule is wrong for a model: fields by model type, or by class where one class of a type differs."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

# Fields without a default that fits the rest.
_INCOMPLETE: dict[str, Fields] = {
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        }
    },
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 48,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
    },
    "emu3": {"vocabulary_map": {"<image>": 90}},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "moe_intermediate_size": [48, 24],
    },
    "esm": {"vocab_size": 96, "mask_token_id": 90, "pad_token_id": 0},
    "instructblip": {"image_token_index": 90},
    "instructblipvideo": {"video_token_index": 90},
    "blip-2": {"image_token_index": 90},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "paddleocr_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 91, "vision_end_token_id": 92},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 91, "vision_end_token_id": 92},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 96,
        "split_ngram_parts": 1,
        "make_ngram_vocab_size_divisible_by": 1,
        "heads_per_ngram": 2,
        "ple_embed_dim": 8,
        "ple_layer_ids": [1],
        "eos_token_id": 2,
    },
    "voxtral": {"audio_token_id": 90},
    "shieldgemma2": {"yes_token_index": 9, "no_token_index": 10},
    "step3p5": {"sliding_window": 8},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}

# Numbers of layers that other fields fix.
_LAYERS: dict[str, Fields] = {
    "cvt": {"depth": (1, 2, 3)},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "n_recurrent_layers": 1,
        "layer_types": None,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2", "spatial_target_layers": [1]},
    "jamba": {"num_hidden_layers": 4},
    "mistral_large4_text": {"no_rope_layers": [1, 0, 1, 1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "layers_block_type": None,
        "attention_hidden_size": None,
        "attention_head_dim": None,
    },
}

# Sizes that depend on each other by more than their names tell.
_SIZES: dict[str, Fields] = {
    "PerceiverForImageClassificationConvProcessing": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "bit": {"num_groups": 8},
    "dia": {"decoder_config.num_channels": 9},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "emu3_vqgan": {"hidden_size": 128},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "fuyu": {"num_channels": 2},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "llama4_vision_model": {"intermediate_size": 128},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"mamba_num_heads": 8},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4},
    # Four frames of the encoder make one token.
    "glmasr_encoder": {"intermediate_size": 128},
    "voxtral_encoder": {"intermediate_size": 128},
    # The last features, and those of two layers before them.
    "mllama_vision_model": {"vision_output_dim": 96, "intermediate_layers_indices": [0, 1]},
    "neomme": {"head_dim": 16},
    # Other than the length of a padded sequence.
    "pegasus_x": {"num_global_tokens": 8},
    "pvt_v2": {"num_attention_heads": (1, 2, 2, 4)},
    "xlstm": {"chunk_size": 16},
}

# Pictures, their patches and windows: none is larger than what a stage sees, and no stage sees a single token.
_PICTURES: dict[str, Fields] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "donut-swin": {"window_size": 2},
    "hiera": {"patch_size": (7, 7)},
    "levit": {"patch_size": 16},
    "llava_next": {"image_grid_pinpoints": [[16, 32], [32, 16]]},
    "llava_next_video": {"image_grid_pinpoints": [[16, 32], [32, 16]]},
    "llava_onevision": {"image_grid_pinpoints": [[16, 32], [32, 16]]},
    "mobilevit": {"image_size": 128},
    "swin": {"window_size": 2},
    "videoprism_vision_model": {"image_size": 16, "tubelet_size": (1, 4, 4)},
}

# The first layer has 32 channels and the last 1280, regardless of the configuration.
_EFFICIENT: Fields = {
    "in_channels": (32, 16),
    "out_channels": (16, 24),
    "kernel_sizes": (3, 5),
    "strides": (1, 2),
    "num_block_repeats": (1, 1),
    "expand_ratios": (1, 6),
    "depth_coefficient": 1.0,
    "width_coefficient": 1.0,
    "hidden_dim": 1280,
}

# What a model of its kind does: a decoder reads its encoder, and is causal.
_READS: Fields = {"decoder.is_decoder": True, "decoder.add_cross_attention": True}
_KINDS: dict[str, Fields] = {
    "ReformerModelWithLMHead": {"is_decoder": True},
    "encoder-decoder": _READS,
    "speech-encoder-decoder": _READS,
    "vision-encoder-decoder": _READS,
    # Hashing is random, and the shape of the positions is a product.
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
}

CHANGES: dict[str, Fields] = {
    **_INCOMPLETE,
    **_LAYERS,
    **_SIZES,
    **_PICTURES,
    **_KINDS,
    "align_vision_model": {**_EFFICIENT, "out_channels": (16, 32)},
    "efficientnet": _EFFICIENT,
}
