"""What PEFT makes of the configuration of a stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from tests.support.placed_models import llama, tiny_mixture
from tests.support.stacks import Adapted

STEPS: list[int] = []  # of this process: how many weights each changed


def model_for(path: str) -> Any:
    """The model of a placement: a mixture for a file named so, else a Llama."""
    return tiny_mixture() if "experts" in Path(path).name else llama()


def by_config(config: LoraConfig, path: str) -> Adapted:
    """The modules that get LoRA in the model of a placement."""
    return of_trained(get_peft_model(model_for(path), config))


def of_trained(wrapped: Any) -> Adapted:
    """The modules of a wrapped language model that carry LoRA, after a step of training."""
    train_one_step(wrapped)
    return of_model(wrapped)


def of_model(wrapped: Any) -> Adapted:
    """The modules of a wrapped model that carry LoRA."""
    inner: nn.Module = getattr(wrapped, "base_model", wrapped)
    inner = getattr(inner, "model", inner)
    found = {}
    for name, layer in inner.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.r
            if isinstance(layer, ParamWrapper):  # those of one module nest
                name = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
            found[name] = (layer.r[adapter], layer.scaling[adapter] * layer.r[adapter])
            assert type(layer.lora_dropout[adapter]) is nn.Identity
    return found


def train_one_step(model: Any) -> None:
    """Train a model with LoRA for a step, which has to change every matrix B, and no weight but A and B."""
    tokens = torch.arange(16)[None] % 8
    weights = dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW([weight for weight in weights.values() if weight.requires_grad], lr=0.01)
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    changed = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert changed >= {name for name in weights if "lora_B" in name} and all("lora_" in name for name in changed)
    STEPS.append(len(changed))
