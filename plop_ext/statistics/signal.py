"""Whether the scores carry a signal: they are not all 1, and both halves of the data agree."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from plop_ext.statistics.resampling import CONFIDENCE, halves, types_over_samples
from plop_ext.statistics.stability import same_lowest, tau_between
from plop_ext.statistics.table import Floats, GainTable

# Two random orders have a tau of 0 on average, equal ones 1.
MIN_TAU = 0.5
MIN_AGREEMENT = 0.95
MIN_SAMPLES = 4


@dataclass(frozen=True)
class Signal:
    """Whether a ranking of types carries a signal.

    Attributes:
        found: Whether there is a signal.
        reason: Empty, or one sentence with the reason why there is none.
        halves_tau: Mean Kendall's tau between the type orders of random halves of the data; None below 4 samples,
            and if no two halves have tokens of every type.
    """

    found: bool
    reason: str
    halves_tau: float | None


def find_signal(table: GainTable, seed: int = 0) -> Signal:
    r"""Test whether the ranking of a table carries a signal.

    There is no signal if every type's NFN is 1 within its interval (95 % for all types together). The interval
    combines the scatter over samples with the scatter that random weights have on any input. For W independent of z,
    \(\lVert W z \rVert^2 / \lVert z \rVert^2\) is \(\lVert W \rVert_F^2 / K\) times a mean of M squares, so the NFN of
    one module has a standard deviation of at most \(1 / \sqrt{2 M - 1}\).

    There is no signal either if random halves of the data disagree: the orders of types have a mean tau below 0.5, and
    for no k are the k lowest types the same in 95 % of the splits.
    """
    n_types = len(table.types)
    half_widths = random_half_widths(table, seed)
    nfn = table.type_nfn(table.all_samples)[0]
    tau, disagree = None, False
    if table.samples >= MIN_SAMPLES and n_types > 1:
        first, second = halves(table, seed=seed)
        # A half without tokens of some type has no order of types.
        known = np.isfinite(first + second).all(axis=1)
        if known.any():
            first, second = first[known], second[known]
            tau = float(tau_between(first, second).mean())
            disagree = tau < MIN_TAU and bool(same_lowest(first, second).max() < MIN_AGREEMENT)
    if (np.abs(nfn - 1) <= half_widths).all():
        reason = (
            f"every type's NFN is 1 within its interval ({nfn.min():.3f} to {nfn.max():.3f}), as in an untrained "
            "model; check that the right checkpoint was loaded"
        )
        return Signal(False, reason, tau)
    if disagree:
        return Signal(
            False, f"halves of the data disagree on the order of types (tau {tau:.2f}); score more data", tau
        )
    return Signal(True, "", tau)


def random_half_widths(table: GainTable, seed: int = 0) -> Floats:
    """Return [T]: how far from 1 each type may be, for all types together, if weights and inputs are independent."""
    n_types = len(table.types)
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2 / n_types)
    by_data = types_over_samples(table, seed=seed).var(axis=0) if table.samples > 1 else np.zeros(n_types)
    modules = np.bincount(table.type_index)
    by_weights = np.bincount(table.type_index, weights=1 / (2 * table.out_features - 1)) / modules**2
    return z * np.sqrt(by_data + by_weights)
