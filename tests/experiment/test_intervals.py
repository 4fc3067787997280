"""Intervals of paired differences: their coverage, what they depend on, and what more rows would give."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plop_ext.experiment.intervals import difference


def made(
    rng: np.random.Generator, rows: int, seeds: int, *, mean: float = 0.0, row: float = 1.0, seed: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses of two placements: shared row losses, and a difference that varies over rows and over seeds."""
    tokens = rng.integers(5, 40, rows).astype(float)
    shared = rng.normal(2.0, 1.0, rows) * tokens
    own = mean + row * rng.normal(size=rows) + seed * rng.normal(size=(seeds, 1))
    return shared + own * tokens, np.tile(shared, (seeds, 1)), tokens


def test_mean_is_weighted_by_tokens() -> None:
    found = difference([[3.0, 2.0], [5.0, 2.0]], [[2.0, 2.0], [2.0, 2.0]], [1, 3], 0.95, 0)
    assert found.mean == pytest.approx((1 / 4 + 3 / 4) / 2) and (found.rows, found.seeds) == (2, 2)


def test_what_both_share_does_not_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    first, second, tokens = made(rng, 50, 5, mean=0.3, row=0.01, seed=0.01)
    found = difference(first, second, tokens, 0.95, 0)
    assert found.low > 0.25 and found.high < 0.35  # the losses themselves vary by 1


@pytest.mark.parametrize(("rows", "seeds", "row", "seed"), [(8, 3, 1.0, 0.0), (40, 3, 0.2, 1.0), (40, 5, 1.0, 0.2)])
def test_intervals_cover(rows: int, seeds: int, row: float, seed: float) -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for number in range(300):
        found = difference(*made(rng, rows, seeds, mean=0.5, row=row, seed=seed), 0.95, number)
        inside += found.low <= 0.5 <= found.high
    assert inside >= 0.93 * 300


def test_higher_confidence_is_wider_and_the_same_seed_is_the_same() -> None:
    data = made(np.random.default_rng(2), 30, 5, row=1.0, seed=0.3)
    narrow, wide = difference(*data, 0.95, 0), difference(*data, 0.99, 0)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert difference(*data, 0.95, 0) == narrow != difference(*data, 0.95, 1)


def test_one_seed_or_one_row_shows_no_spread() -> None:
    data = made(np.random.default_rng(3), 30, 1)
    found = difference(*data, 0.95, 0)
    assert not found.known and math.isnan(found.over_seeds) and math.isfinite(found.low)
    assert found.needed(0.01) is None
    alone = difference([[1.0], [1.1]], [[0.9], [0.8]], [4], 0.95, 0)
    assert not alone.known and math.isnan(alone.over_rows)


class TestNeeded:
    def test_predicted_numbers_decide_what_was_not_decided(self) -> None:
        decided = 0
        for number in range(20):
            rng = np.random.default_rng(100 + number)
            found = difference(*made(rng, 40, 3, mean=0.1, row=0.5, seed=0.05), 0.95, 0)
            needed = found.needed(0.01)
            if needed is None or not found.low < 0 < found.high:
                continue
            assert needed[0] >= 40 and needed[1] >= 3 and needed != (40, 3)
            # With the difference and the spread that were found, not those of the population.
            scale = found.over_rows / 1.96 * math.sqrt(40) if found.over_rows else 0.5
            more = difference(*made(rng, needed[0], needed[1], mean=found.mean, row=scale, seed=0.02), 0.95, 0)
            decided += more.low > 0 or more.high < 0
        assert decided >= 8

    def test_a_difference_inside_the_margin_needs_less(self) -> None:
        data = made(np.random.default_rng(4), 40, 5, mean=0.0, row=0.3, seed=0.01)
        found = difference(*data, 0.95, 0)
        loose, tight = found.needed(1.0), found.needed(abs(found.mean) * 1.5)
        assert loose == (40, 5) and tight is not None and tight[0] > 40
