"""Automatic k: the cuts of the ranking that separate no tied types."""

from __future__ import annotations

import math
from dataclasses import dataclass

from plop_ext.statistics.resampling import types_over_layers, types_over_samples, without_each_layer
from plop_ext.statistics.stability import set_holds
from plop_ext.statistics.table import GainTable

# The paper's k.
DEFAULT_TYPES = 3
# Share of resamples in which the set below a boundary must be the same.
OVER_SAMPLES = 0.99
OVER_LAYERS = 0.95
# Smallest relative step of NFN across a boundary, even if the boundary is stable: the choice of baseline changes the
# NFN of a type by up to 0.7 %, and 4-bit weights change it by 0.6 %.
MIN_GAP = 0.01


@dataclass(frozen=True)
class Boundary:
    """The cut between the k-th and the next type.

    Attributes:
        k: Types below it.
        gap: Relative step of NFN across it, NFN[k + 1] / NFN[k] - 1.
        over_samples: Share of resamples of the samples with the same k lowest types.
        over_layers: Share of resamples of the layers with the same k lowest types.
        without_a_layer: Whether the k lowest types stay the same when any one layer is left out.
    """

    k: int
    gap: float
    over_samples: float
    over_layers: float
    without_a_layer: bool

    @property
    def survives(self) -> bool:
        """Whether the boundary passes every test."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """The tests that the boundary fails, in words."""
        found = []
        for share, least, units in (
            (self.over_samples, OVER_SAMPLES, "samples"),
            (self.over_layers, OVER_LAYERS, "layers"),
        ):
            if share < least:
                # Truncated: 98.97 % must not be printed as 99 %, the limit that it misses.
                percent = math.floor(1000 * share) / 10
                found.append(f"only {percent:g} % of the resamples of {units} give the same {self.k} lowest types")
        if not self.without_a_layer:
            found.append(f"leaving out one of the layers changes the {self.k} lowest types")
        if self.gap < MIN_GAP:
            found.append(f"NFN rises by only {100 * self.gap:.2g} %")
        return tuple(found)


@dataclass(frozen=True)
class AutoK:
    """The number of types that automatic k chooses.

    Attributes:
        k: The choice.
        found: Whether a boundary survived; otherwise k is the fallback.
        reason: k and the reason for it, to follow `automatic k is`.
        boundaries: Every cut that was tested, k ascending.
    """

    k: int
    found: bool
    reason: str
    boundaries: tuple[Boundary, ...]


def find_boundaries(table: GainTable, seed: int = 0) -> tuple[Boundary, ...]:
    """Test every cut of the ranking of types."""
    nfn = table.type_nfn(table.all_samples)[0]
    samples = set_holds(types_over_samples(table, seed=seed))
    layers = set_holds(types_over_layers(table, seed=seed))
    # A set that depends on a single layer is not a property of the model.
    each = set_holds(without_each_layer(table)) == 1.0
    return tuple(
        Boundary(k, float(nfn[k] / nfn[k - 1] - 1), float(samples[k - 1]), float(layers[k - 1]), bool(each[k - 1]))
        for k in range(1, len(table.types))
    )


def auto_k(table: GainTable, fallback: int | None = None, seed: int = 0) -> AutoK:
    """Choose k: the surviving boundary nearest to the paper's 3; of two equally near, the lower one.

    A boundary survives if its set of lowest types is the same in 99 % of the resamples of samples, in 95 % of the
    resamples of layers and without any one layer, and if NFN rises by at least 1 % across it. The size of a gap
    matters only for the last test: the position of the largest gap changes with the data (after 3 or 6 of 7 types),
    and no measurement shows that a larger gap is better.

    Args:
        table: The totals.
        fallback: k if no boundary survives. Default 3, or all types if there are fewer.
        seed: Seed of the resamples.
    """
    n_types = len(table.types)
    boundaries = find_boundaries(table, seed)
    real = [boundary.k for boundary in boundaries if boundary.survives]
    if real:
        k = min(real, key=lambda k: (abs(k - DEFAULT_TYPES), k))
        if len(real) == 1:
            reason = f"{k}: the only cut that is stable under resampling"
        else:
            reason = f"{k}: of the cuts after {_listed(real)}, which are stable under resampling, the nearest to 3"
        return AutoK(k, True, reason, boundaries)
    k = min(DEFAULT_TYPES, n_types) if fallback is None else fallback
    if n_types < 2:
        return AutoK(k, False, f"{k}: there is one type", boundaries)
    source = "the paper's number" if fallback is None else "the most that the budget allows"
    across = ""
    if k < n_types:
        why = ", ".join(boundaries[k - 1].failures)
        across = f"; the cut between {table.types[k - 1]} and {table.types[k]} fails: {why}"
    return AutoK(k, False, f"{k}: no cut passes every test, so this is {source}{across}", boundaries)


def _listed(values: list[int]) -> str:
    return f"{', '.join(map(str, values[:-1]))} and {values[-1]}"
