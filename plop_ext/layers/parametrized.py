"""Weights that PEFT changes during a forward: LoRA on a parameter (`target_parameters`) is added to W itself.

The output of such a module is (W + dW) z. The score is that of the base layer W, so W z is computed again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def base_weight(module: nn.Module, name: str) -> Tensor | None:
    """Return parameter `name` with all parametrizations but PEFT's; None if PEFT does not change it at present."""
    parametrizations: Any = module._modules.get("parametrizations")
    if parametrizations is None or name not in parametrizations:
        return None
    steps = list(parametrizations[name])
    kept = [step for step in steps if not _from_peft(step)]
    if len(kept) == len(steps):
        return None
    weight: Tensor = parametrizations[name].original
    for step in kept:
        weight = step(weight)
    return weight


def changed_by_peft(module: nn.Module) -> bool:
    """Return whether PEFT changes any parameter of `module` at present."""
    parametrizations: Any = module._modules.get("parametrizations")
    return parametrizations is not None and any(
        _from_peft(step) for name in parametrizations for step in parametrizations[name]
    )


def _from_peft(step: nn.Module) -> bool:
    return type(step).__module__.split(".", 1)[0] == "peft"
