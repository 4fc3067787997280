"""How the choice settles as samples come in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plop_ext.statistics.stability import set_holds, tau_between
from plop_ext.statistics.table import GainTable

_DRAWS = 400


@dataclass(frozen=True)
class CurvePoint:
    """What n samples would have said.

    Attributes:
        samples: n.
        same_set: Share of draws of n samples whose k lowest types are those of all samples.
        tau: Mean Kendall's tau of their type order with that of all samples.
    """

    samples: int
    same_set: float
    tau: float


def stability_curve(table: GainTable, k: int, seed: int = 0) -> tuple[CurvePoint, ...]:
    """Draw n of the samples with replacement, for n = 1, 2, 4, ... and all of them."""
    rng = np.random.default_rng(seed)
    everything = table.type_nfn(np.ones((1, table.samples)))
    order = np.arange(len(table.types))
    sizes = sorted({2**power for power in range(table.samples.bit_length())} | {table.samples})
    points = []
    for size in sizes:
        chosen = rng.integers(0, table.samples, size=(_DRAWS, size)) + table.samples * np.arange(_DRAWS)[:, None]
        weights = np.bincount(chosen.ravel(), minlength=_DRAWS * table.samples).reshape(_DRAWS, table.samples)
        values = table.type_nfn(weights.astype(np.float64))
        same = 1.0 if k >= len(order) else float(set_holds(values, order)[k - 1])
        tau = float(tau_between(values, np.repeat(everything, _DRAWS, axis=0)).mean()) if len(order) > 1 else 1.0
        points.append(CurvePoint(size, same, tau))
    return tuple(points)
