"""How the choice stabilizes with the number of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from plop_ext.statistics.resampling import counts_of_draws
from plop_ext.statistics.stability import set_holds, tau_between
from plop_ext.statistics.table import GainTable

_RESAMPLES = 400


@dataclass(frozen=True)
class CurvePoint:
    """The ranking that n samples would have given.

    Attributes:
        samples: n.
        same_set: Share of resamples of size n whose k lowest types are those of all samples.
        tau: Mean Kendall's tau between the type order of these resamples and that of all samples, over the resamples
            in which every type has tokens; NaN if there is none.
    """

    samples: int
    same_set: float
    tau: float


def stability_curve(table: GainTable, k: int, seed: int = 0) -> tuple[CurvePoint, ...]:
    """Compute the curve by resampling n samples with replacement, for n = 1, 2, 4, ... and all of them."""
    rng = np.random.default_rng(seed)
    everything = table.type_nfn(table.all_samples)
    n_types = len(table.types)
    sizes = sorted({2**power for power in range(table.samples.bit_length())} | {table.samples})
    points = []
    for size in sizes:
        values = table.type_nfn(counts_of_draws(rng, table.samples, _RESAMPLES, size))
        same = 1.0 if k >= n_types else float(set_holds(values)[k - 1])
        whole = values[np.isfinite(values).all(axis=1)]
        if n_types < 2:
            tau = 1.0
        else:
            tau = float(tau_between(whole, everything).mean()) if len(whole) else math.nan
        points.append(CurvePoint(size, same, tau))
    return tuple(points)
