"""Sizes, batches and builders of the tiny architectures, and the layouts of their packed weights.

A layout says which output columns are q, k and v (or gate and up): the lines of the model's forward that take the
output apart, applied to the column numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES, TOKENS, VOCAB = 3, 24, 96
HIDDEN, INNER, HEADS, KV_HEADS = 32, 48, 4, 2
WIDTH = HIDDEN // HEADS

Columns = dict[str, Tensor]


def text_batch() -> dict[str, Tensor]:
    """The first sample left-padded, the second right-padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB - 8, (SAMPLES, TOKENS), generator=generator)
    mask = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, 20:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def long_batch() -> dict[str, Tensor]:
    """Enough tokens for every expert of the tiny models."""
    batch = text_batch()
    ids = torch.randint(5, 88, (12, 24), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": batch["attention_mask"].repeat(4, 1)}


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


TEXT = {
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
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_local_experts": 4, "num_experts": 4}
GPT = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 64}
VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 8,
}


PLAIN = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}


def from_config(model: str, config: str, /, **fields: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        with torch.random.fork_rng():
            torch.manual_seed(0)  # of vectors such as the attention sinks of gpt-oss
            return finished(getattr(transformers, model)(getattr(transformers, config)(**fields)))

    return build


def llava() -> nn.Module:
    import transformers

    vision = transformers.CLIPVisionConfig(**VISION, projection_dim=HIDDEN)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
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
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    )
    return finished(transformers.Qwen2VLForConditionalGeneration(config))


def clip() -> nn.Module:
    import transformers

    config = transformers.CLIPConfig(text_config=PLAIN, vision_config=VISION, projection_dim=HIDDEN)
    return finished(transformers.CLIPModel(config))


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
