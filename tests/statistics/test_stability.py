"""Agreement of resamples on hand-made orders. Equal values hold no order."""

from __future__ import annotations

import time

import numpy as np
import pytest

from plop_ext.statistics import stability

SAME, SWAPPED, REVERSED, EQUAL = [1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [3.0, 2.0, 1.0], [1.0, 1.0, 2.0]
VALUES = np.array([SAME, SAME, SWAPPED, REVERSED])


def test_set_holds() -> None:
    assert stability.set_holds(VALUES).tolist() == [0.75, 0.5]
    assert stability.set_holds(VALUES[:, ::-1]).tolist() == [0.25, 0.25]
    assert stability.set_holds(np.array([EQUAL])).tolist() == [0.0, 1.0]
    # Only the set counts, not the order inside and outside of it.
    assert stability.set_holds(np.array([[2.0, 1.0, 4.0, 3.0]])).tolist() == [0.0, 1.0, 0.0]


def test_among_lowest() -> None:
    assert stability.among_lowest(VALUES, 1).tolist() == [0.75, 0.0, 0.25]
    assert stability.among_lowest(VALUES, 2).tolist() == [0.75, 0.75, 0.5]
    assert stability.among_lowest(VALUES, 3).tolist() == [1.0, 1.0, 1.0]


def test_of_equal_values_the_first_are_the_lowest() -> None:
    # Long enough that a sort that is not stable changes their order.
    values = np.array([[0.0, 1.0] * 32])
    assert stability.among_lowest(values, 20).tolist() == [1.0, 0.0] * 20 + [0.0, 0.0] * 12
    apart = values + np.arange(64) / 100
    assert stability.same_lowest(values, apart).tolist() == [1.0] * 63


def test_neighbours_hold() -> None:
    assert stability.neighbours_hold(VALUES).tolist() == [0.75, 0.5]
    assert stability.neighbours_hold(np.array([EQUAL])).tolist() == [0.0, 1.0]
    assert stability.neighbours_hold(np.array([[1.0, 3.0, 2.0, 4.0]])).tolist() == [1.0, 0.0, 1.0]


def test_tau_between_rows() -> None:
    found = stability.tau_between(np.array([SAME] * 4), np.array([SAME, SWAPPED, REVERSED, EQUAL]))
    assert found.tolist() == pytest.approx([1.0, 1 / 3, -1.0, 2 / 3])
    assert stability.tau_between(VALUES, np.array([SAME])).tolist() == pytest.approx([1.0, 1.0, 1 / 3, -1.0])


def test_same_lowest() -> None:
    assert stability.same_lowest(VALUES, VALUES[[0, 2, 2, 3]]).tolist() == [1.0, 0.75]
    # One has what the other lacks: neither contains the other.
    assert stability.same_lowest(np.array([SAME]), np.array([REVERSED])).tolist() == [0.0, 0.0]


def test_mean_tau_is_over_pairs_of_different_resamples() -> None:
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = np.mean([stability.tau_between(VALUES[[i]], VALUES[[j]])[0] for i, j in pairs])
    assert stability.mean_tau(VALUES) == pytest.approx(expected)
    assert stability.mean_tau(np.array([[1.0, 2.0], [1.0, 2.0]])) == 1.0
    assert stability.mean_tau(np.array([[1.0, 2.0], [2.0, 1.0]])) == -1.0
    assert stability.mean_tau(np.array([[1.0], [2.0]])) == 1.0


def test_tau_is_the_mean_of_the_products_of_signs_also_with_ties() -> None:
    generator = np.random.default_rng(0)
    for n in (2, 3, 5, 8, 17):
        for levels in (3, 10**6):
            first, second = (generator.integers(0, levels, (20, n)).astype(float) for _ in range(2))
            pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
            expected = [
                np.mean([np.sign(a[j] - a[i]) * np.sign(b[j] - b[i]) for i, j in pairs])
                for a, b in zip(first, second, strict=True)
            ]
            np.testing.assert_array_equal(stability.tau_between(first, second), expected)
            both = [stability.tau_between(first[[a]], first[[b]])[0] for a in range(20) for b in range(20) if a != b]
            assert stability.mean_tau(first) == pytest.approx(np.mean(both), rel=1e-12)


def test_two_thousand_types_need_no_table_of_pairs() -> None:
    values = np.random.default_rng(0).random((40, 2000))
    started = time.process_time()
    stability.tau_between(values, values[::-1])
    stability.same_lowest(values, values[::-1])
    # A table of pairs by resamples has 80 million entries here and takes over 4 s.
    assert time.process_time() - started < 2
