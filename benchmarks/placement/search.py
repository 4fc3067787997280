"""Which learning rates and seeds a row still needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Run = tuple[float, int]  # learning rate, seed
_WIDENED = 6  # most rates tried beyond the first


def wanted(rates: Sequence[float], seeds: int, done: Mapping[Run, float | None]) -> list[Run]:
    """The runs to do next; none when the row is complete.

    The first seed tries all `rates`; while the best of them is the smallest or largest tried, one more on that side;
    then the other seeds run at the best.

    Args:
        rates: The first rates, rising by one factor.
        seeds: How many.
        done: Validation loss of the runs that are done; None: it diverged.
    """
    missing = [(rate, 0) for rate in rates if (rate, 0) not in done]
    if missing:
        return missing
    tried = sorted(rate for rate, seed in done if seed == 0)
    best, factor = chosen_rate(done), rates[1] / rates[0]
    if len(tried) < len(rates) + _WIDENED and at_edge(done):
        return [(best / factor if best == tried[0] else best * factor, 0)]
    return [(best, seed) for seed in range(1, seeds) if (best, seed) not in done]


def chosen_rate(done: Mapping[Run, float | None]) -> float:
    """The rate with the lowest validation loss of the first seed; the smallest if all diverged."""
    return min((rate for rate, seed in sorted(done) if seed == 0), key=lambda rate: _loss(done[rate, 0]))


def at_edge(done: Mapping[Run, float | None]) -> bool:
    """Whether the chosen rate is the smallest or the largest tried."""
    tried = sorted(rate for rate, seed in done if seed == 0)
    return chosen_rate(done) in (tried[0], tried[-1])


def _loss(value: float | None) -> float:
    return math.inf if value is None else value
