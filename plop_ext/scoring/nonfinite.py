"""NaN and infinite values in weights and activations, and the first module that holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from plop_ext.layers import LinearLayer
from plop_ext.scoring.outcome import Outcome


def find_nonfinite(layers: Sequence[LinearLayer], outcome: Outcome) -> str | None:
    """Return one phrase on the values of a model that are NaN or infinite; None if there are none.

    A bad weight makes all activations after it bad, so the first bad weight is named, or else the first module with
    bad activations.

    Args:
        layers: The layers, in the model's order.
        outcome: The numbers of their run.
    """
    tokens = outcome.totals.sum_samples().skipped_nonfinite
    weights = [
        layer.name
        for layer, norm in zip(layers, outcome.norms.values, strict=True)
        if layer.name not in outcome.norms.failures and not math.isfinite(norm)
    ]
    activations = [layer.name for layer, count in zip(layers, tokens.tolist(), strict=True) if count]
    found = [
        f"the {what} of `{names[0]}`" + (f" and of {len(names) - 1} other modules" if len(names) > 1 else "")
        for what, names in (("weights", weights), ("inputs or outputs", activations))
        if names
    ]
    return f"NaN or infinite values in {' and in '.join(found)}" if found else None
