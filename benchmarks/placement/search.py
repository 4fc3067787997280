"""Which learning rates and seeds a row still needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Run = tuple[float, int]  # learning rate, seed
_WIDENED = 6  # most rates tried beyond the first


def wanted(rates: Sequence[float], search_seeds: int, seeds: int, done: Mapping[Run, float | None]) -> list[Run]:
    """The runs to do next; none when the row is complete.

    The search seeds try all `rates`; while the best of them is the smallest or largest tried, one more on that side;
    then the other seeds run at the best.

    Args:
        rates: The first rates, rising by one factor.
        search_seeds: How many seeds choose the rate.
        seeds: How many run at the chosen one.
        done: Validation loss of the runs that are done; None: it diverged.
    """
    tried = sorted({*rates, *(rate for rate, _ in done)})
    missing = [(rate, seed) for rate in tried for seed in range(search_seeds) if (rate, seed) not in done]
    if missing:
        return missing
    best, factor = chosen_rate(done, search_seeds), rates[1] / rates[0]
    if len(tried) < len(rates) + _WIDENED and at_edge(done, search_seeds):
        wider = best / factor if best == tried[0] else best * factor
        return [(wider, seed) for seed in range(search_seeds)]
    return [(best, seed) for seed in range(search_seeds, seeds) if (best, seed) not in done]


def chosen_rate(done: Mapping[Run, float | None], search_seeds: int) -> float:
    """The rate with the lowest mean validation loss over the search seeds; the smallest if all diverged."""
    return min(_searched(done, search_seeds), key=lambda rate: sum(_loss(done[rate, s]) for s in range(search_seeds)))


def at_edge(done: Mapping[Run, float | None], search_seeds: int) -> bool:
    """Whether the chosen rate is the smallest or the largest tried."""
    tried = _searched(done, search_seeds)
    return chosen_rate(done, search_seeds) in (tried[0], tried[-1])


def _searched(done: Mapping[Run, float | None], search_seeds: int) -> list[float]:
    """The rates that every search seed has tried, rising."""
    rates = sorted({rate for rate, _ in done})
    return [rate for rate in rates if all((rate, seed) in done for seed in range(search_seeds))]


def _loss(value: float | None) -> float:
    return math.inf if value is None else value
