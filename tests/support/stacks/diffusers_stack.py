"""diffusers: `add_adapter` of a transformer, on the options of its training scripts."""

from __future__ import annotations

from pathlib import Path

from diffusers import FluxTransformer2DModel
from peft import LoraConfig

from tests.support.stack_readers import PEFT
from tests.support.stacks import Adapted
from tests.support.stacks.by_peft import of_model


def adapted(path: str) -> Adapted:
    arguments = PEFT["diffusers"](Path(path).read_text(encoding="utf-8"))
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=11,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    model.add_adapter(LoraConfig(init_lora_weights="gaussian", **arguments))
    return of_model(model)
