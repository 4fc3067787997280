"""NeMo Automodel: its `PeftConfig`, and the function that replaces linear layers."""

from __future__ import annotations

import yaml

from tests.support.placed_models import llama
from tests.support.stacks import Adapted
from tests.support.stacks.by_peft import train_one_step
from tests.support.stacks.stand_ins import stand_in

stand_in("torchao")

from nemo_automodel.components._peft.lora import LinearLoRA, PeftConfig, apply_lora_to_linear_modules  # noqa: E402


def adapted(path: str) -> Adapted:
    with open(path, encoding="utf-8") as stream:
        keys = yaml.safe_load(stream)["peft"]
    assert keys.pop("_target_") == f"{PeftConfig.__module__}.PeftConfig"
    model = llama()
    apply_lora_to_linear_modules(model, PeftConfig(**keys))
    train_one_step(model)
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, LinearLoRA)}
    return {name: (layer.dim, layer.scale * layer.dim) for name, layer in found.items()}
