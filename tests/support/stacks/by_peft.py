"""What PEFT makes of the configuration of a stack."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from tests.support.placed_models import llama
from tests.support.stacks import Adapted


def by_config(config: LoraConfig) -> Adapted:
    """The modules that get LoRA in the model of the placements."""
    return of_model(get_peft_model(llama(), config))


def of_model(wrapped: Any) -> Adapted:
    """The modules of a wrapped model that carry LoRA."""
    inner: nn.Module = getattr(wrapped, "base_model", wrapped)
    inner = getattr(inner, "model", inner)
    found = {}
    for name, layer in inner.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.r
            found[name] = (layer.r[adapter], layer.scaling[adapter] * layer.r[adapter])
            assert type(layer.lora_dropout[adapter]) is nn.Identity
    return found
