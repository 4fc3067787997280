"""The modules of a model, under their names without adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside PEFT's wrapper; `model` itself if there is none."""
    wrapped: Any = model
    if _from_peft(model) and hasattr(model, "get_base_model"):
        return wrapped.get_base_model()
    return model


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) in the order of `named_modules`, with wrapped layers unwrapped and LoRA's matrices omitted.

    A module with several names is yielded once per name; `discover` keeps the first.
    """
    yield from _visit(base_model(model), "", frozenset())


def _visit(module: nn.Module, name: str, above: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
    layer: Any = module
    while _from_peft(layer):  # LoRA on two parameters of one module nests
        if isinstance(getattr(layer, "base_layer", None), nn.Module):
            layer = layer.base_layer
        elif isinstance(getattr(layer, "original_module", None), nn.Module):
            layer = layer.original_module
        else:
            break
    if id(layer) in above:
        return
    yield name, layer
    for child_name, child in layer._modules.items():
        if child is not None:
            yield from _visit(child, f"{name}.{child_name}" if name else child_name, above | {id(layer)})


def _from_peft(module: nn.Module) -> bool:
    return type(module).__module__.split(".", 1)[0] == "peft"
