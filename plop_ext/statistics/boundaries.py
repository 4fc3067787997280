"""Automatic k: between which two types the ranking can be cut without cutting through a tie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from plop_ext.statistics.resampling import types_over_layers, types_over_samples, without_each_layer
from plop_ext.statistics.stability import set_holds
from plop_ext.statistics.table import GainTable

# The paper's k.
DEFAULT_TYPES = 3
# Share of resamples in which the set below a boundary must be the same.
OVER_SAMPLES = 0.99
OVER_LAYERS = 0.95
# Relative step below which a boundary is none, however sure: the choice of baseline moves a type by up to 0.7 %, 4-bit
# weights by 0.6 %.
MIN_GAP = 0.01


@dataclass(frozen=True)
class Boundary:
    """The cut between the k-th and the next type.

    Attributes:
        k: Types below it.
        gap: Relative step of NFN across it, NFN[k + 1] / NFN[k] - 1.
        over_samples: Share of draws of samples with the same k lowest types.
        over_layers: Share of draws of layers with the same k lowest types.
        without_a_layer: Whether the k lowest stay the same without any one layer.
    """

    k: int
    gap: float
    over_samples: float
    over_layers: float
    without_a_layer: bool

    @property
    def survives(self) -> bool:
        """Whether it passes every test."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """The tests it fails, in words."""
        found = []
        for share, least, draws in (
            (self.over_samples, OVER_SAMPLES, "samples"),
            (self.over_layers, OVER_LAYERS, "layers"),
        ):
            if share < least:
                # Cut, not rounded: 98.97 % must not read as the 99 % that it misses.
                percent = math.floor(1000 * share) / 10
                found.append(f"the {self.k} lowest are the same in {percent:g} % of the draws of {draws} only")
        if not self.without_a_layer:
            found.append(f"the {self.k} lowest are others without one of the layers")
        if self.gap < MIN_GAP:
            found.append(f"NFN rises by {100 * self.gap:.2g} % only")
        return tuple(found)


@dataclass(frozen=True)
class AutoK:
    """How many types to choose.

    Attributes:
        k: The choice.
        found: Whether a boundary survived; otherwise k is the fallback.
        reason: k and why, to follow `automatic k is`.
        boundaries: Every cut that was looked at, k ascending.
    """

    k: int
    found: bool
    reason: str
    boundaries: tuple[Boundary, ...]


def find_boundaries(table: GainTable, seed: int = 0) -> tuple[Boundary, ...]:
    """Test every cut of the ranking of types."""
    order = np.arange(len(table.types))
    nfn = table.type_nfn(np.ones((1, table.samples)))[0]
    samples = set_holds(types_over_samples(table, seed=seed), order)
    layers = set_holds(types_over_layers(table, seed=seed), order)
    # A set that some layer carries alone is not the model's.
    each = set_holds(without_each_layer(table), order) == 1.0
    return tuple(
        Boundary(k, float(nfn[k] / nfn[k - 1] - 1), float(samples[k - 1]), float(layers[k - 1]), bool(each[k - 1]))
        for k in range(1, len(order))
    )


def auto_k(table: GainTable, fallback: int | None = None, seed: int = 0) -> AutoK:
    """Choose k: the surviving boundary nearest to the paper's 3, the lower of two as near.

    A boundary survives if its set of lowest types is the same in 99 % of the draws of samples, in 95 % of the draws of
    layers and without any one layer, and if NFN rises by at least 1 % across it. The size of the gaps decides nothing
    else: which gap is the largest flips with the data (3 or 6 of 7), and no measurement says a larger one is better.

    Args:
        table: The totals.
        fallback: k where no boundary survives. Default 3, or all types where there are fewer.
        seed: Of the draws.
    """
    n_types = len(table.types)
    boundaries = find_boundaries(table, seed)
    real = [boundary.k for boundary in boundaries if boundary.survives]
    if real:
        k = min(real, key=lambda k: (abs(k - DEFAULT_TYPES), k))
        if len(real) == 1:
            reason = f"{k}: the only cut that no resampling moves"
        else:
            reason = f"{k}: of the cuts after {_listed(real)}, which no resampling moves, the nearest to 3"
        return AutoK(k, True, reason, boundaries)
    k = min(DEFAULT_TYPES, n_types) if fallback is None else fallback
    if n_types < 2:
        return AutoK(k, False, f"{k}: there is one type", boundaries)
    source = "the paper's number" if fallback is None else "what the budget allows"
    across = ""
    if k < n_types:
        why = ", ".join(boundaries[k - 1].failures)
        across = f"; the cut between {table.types[k - 1]} and {table.types[k]} fails: {why}"
    return AutoK(k, False, f"{k}: no cut passes every test, so this is {source}{across}", boundaries)


def _listed(values: list[int]) -> str:
    return f"{', '.join(map(str, values[:-1]))} and {values[-1]}"
