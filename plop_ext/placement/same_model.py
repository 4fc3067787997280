"""The check that a model is the scored one, by the shapes of all targets and the norms of a few weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from plop_ext.arguments import check_type
from plop_ext.errors import InputError
from plop_ext.layers import Unsupported, adapter_for, base_model, base_modules, plain_class, weights_in_place
from plop_ext.lora_target import LoraTarget
from plop_ext.placement.fingerprint import Fingerprint

# Number of weights to read, which takes milliseconds; another checkpoint differs in all of them.
_CHECKED = 8
# Rounding to bfloat16 moves a norm by less than 1e-4; 4-bit codes, as in QLoRA on scores of full precision, by less
# than 1e-2.
_TOLERANCE = 1e-3
_TOLERANCE_ACROSS_KINDS = 0.05


def check_same_model(model: nn.Module, targets: Iterable[LoraTarget], fingerprints: Mapping[str, Fingerprint]) -> None:
    """Check that `model` has every target in its scored shape, and check the weights of a few targets.

    Raises:
        InputError: If a target is missing, or has another shape or weight: the placement is of another model.
    """
    check_type(nn.Module, "a model", model=model)
    modules = dict(base_modules(model))
    _check_shapes(model, modules, targets)
    _check_weights(model, modules, fingerprints)


def _check_shapes(model: nn.Module, modules: Mapping[str, nn.Module], targets: Iterable[LoraTarget]) -> None:
    for target in targets:
        found = _found_shape(modules, target)
        if found == target.shape:
            continue
        state = "has no such module" if found is None else f"has {_extents(found)} there"
        raise InputError(
            f"the placement was made for another model: it wants `{target.name}` ({_extents(target.shape)}), "
            f"but {plain_class(base_model(model)).__name__} {state}; score this model and place again"
        )


def _found_shape(modules: Mapping[str, nn.Module], target: LoraTarget) -> tuple[int, ...] | None:
    if target.parameter:
        owner, _, leaf = target.name.rpartition(".")
        parameter: Any = getattr(modules.get(owner), leaf, None)
        return None if parameter is None else tuple(parameter.shape)
    module = modules.get(target.name)
    adapter = None if module is None else adapter_for(module)
    return None if module is None or adapter is None else adapter.features(module)


def _extents(shape: tuple[int, ...]) -> str:
    return " x ".join(str(extent) for extent in shape)


def _check_weights(
    model: nn.Module, modules: Mapping[str, nn.Module], fingerprints: Mapping[str, Fingerprint]
) -> None:
    """Check the norms of a few weights, spread over the model, if they can be read."""
    step = max(1, math.ceil(len(fingerprints) / _CHECKED))
    for name in tuple(fingerprints)[::step]:
        scored = fingerprints[name]
        kind, norm = _read(modules[name])
        if norm is None:
            continue
        tolerance = _TOLERANCE if kind == scored.kind else _TOLERANCE_ACROSS_KINDS
        if not math.isclose(norm, scored.norm, rel_tol=tolerance):
            raise InputError(
                f"the placement was made for other weights: `{name}` was scored with norm {scored.norm:.4g}, in this "
                f"{plain_class(base_model(model)).__name__} it has {norm:.4g}; score this model and place again"
            )


def _read(module: nn.Module) -> tuple[str, float | None]:
    """Read a module's kind and ||W||_F, or None if the weight cannot be read directly."""
    adapter = adapter_for(module)
    if adapter is None or adapter.weights == "identity":
        return "", None
    try:
        adapter.check(module)
        with weights_in_place(module):
            return adapter.kind, math.sqrt(float(adapter.weight_sumsq(module).sum()))
    except Unsupported:
        return adapter.kind, None
