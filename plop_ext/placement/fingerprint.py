"""Whether a model's weights are those that were scored: shapes alone do not tell two checkpoints apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from plop_ext.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from plop_ext.placement.targets import Target
    from plop_ext.score_data import ScoredModule

# Reading a few weights takes milliseconds, and another checkpoint differs in all of them.
_CHECKED = 8
# Rounding to bfloat16 moves a norm by less than 1e-4; 4-bit codes, as in QLoRA on scores of full precision, by less
# than 1e-2.
_TOLERANCE = 1e-3
_TOLERANCE_ACROSS_KINDS = 0.05


def target_norm(held: Iterable[ScoredModule], shape: tuple[int, ...]) -> float | None:
    """||W||_F of a target module that holds these scored modules; None if it is unknown or they are not all of it."""
    norms, features = [], 0
    for module in held:
        if module.target_parameter or module.weight_norm is None:
            return None
        norms.append(module.weight_norm)
        features += module.out_features
    return math.hypot(*norms) if features == shape[-1] else None


def check_weights(model: nn.Module, targets: Sequence[Target]) -> None:
    """Check that a few targets have the weights that were scored, where both norms can be read.

    Raises:
        InputError: If one has another norm: the placement belongs to another checkpoint.
    """
    known = [target for target in targets if target.weight_norm is not None]
    step = max(1, math.ceil(len(known) / _CHECKED))
    for target in known[::step]:
        kind, norm = _read(model.get_submodule(target.name))
        if norm is None or target.weight_norm is None:
            continue
        tolerance = _TOLERANCE if kind == target.kind else _TOLERANCE_ACROSS_KINDS
        if not math.isclose(norm, target.weight_norm, rel_tol=tolerance):
            raise InputError(
                f"the placement was made for other weights: `{target.name}` was scored with norm "
                f"{target.weight_norm:.4g}, in this {type(model).__name__} it has {norm:.4g}; score this model and "
                "place again"
            )


def _read(module: nn.Module) -> tuple[str, float | None]:
    """A module's kind and ||W||_F, which is None where it takes more than reading the weight."""
    from plop_ext.layers import Unsupported, adapter_for, weights_in_place

    adapter = adapter_for(module)
    if adapter is None or adapter.weights == "identity":
        return "", None
    try:
        adapter.check(module)
        with weights_in_place(module):
            return adapter.kind, math.sqrt(float(adapter.weight_sumsq(module).sum()))
    except Unsupported:
        return adapter.kind, None
