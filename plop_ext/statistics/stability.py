"""Agreement of resamples: the set of the k lowest, the order of neighbours, Kendall's tau."""

from __future__ import annotations

import numpy as np

from plop_ext.statistics.table import Floats


def set_holds(values: Floats, order: np.ndarray) -> Floats:
    """Return [n - 1] for k = 1 .. n - 1: the share of resamples whose k lowest are the first k of `order`.

    Args:
        values: [R, n] resampled values.
        order: [n] positions, lowest value of the estimate first.
    """
    ranked = values[:, order]
    highest_inside = np.maximum.accumulate(ranked, axis=1)[:, :-1]
    lowest_outside = np.minimum.accumulate(ranked[:, ::-1], axis=1)[:, ::-1][:, 1:]
    return (highest_inside < lowest_outside).mean(axis=0)


def among_lowest(values: Floats, k: int) -> Floats:
    """Return [n]: the share of resamples in which each column is among the k lowest."""
    ranks = values.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return (ranks < k).mean(axis=0)


def neighbours_hold(values: Floats) -> Floats:
    """Return [n - 1]: the share of resamples in which column i is below column i + 1."""
    return (values[:, :-1] < values[:, 1:]).mean(axis=0)


def tau_between(first: Floats, second: Floats) -> Floats:
    """Return [R]: Kendall's tau between the orders of two [R, n] tables, row by row."""
    signs = [_pair_signs(values) for values in (first, second)]
    return (signs[0] * signs[1]).mean(axis=1)


def same_lowest(first: Floats, second: Floats) -> Floats:
    """Return [n - 1] for k = 1 .. n - 1: the share of rows in which two [R, n] tables have the same k lowest."""
    ranks = [values.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") for values in (first, second)]
    return np.array(
        [((ranks[0] < k) == (ranks[1] < k)).all(axis=1).mean() for k in range(1, first.shape[1])], dtype=np.float64
    )


def mean_tau(values: Floats) -> float:
    """Return the mean Kendall's tau between two different resamples of [R, n]."""
    if values.shape[1] < 2:
        return 1.0
    signs = _pair_signs(values)
    count = len(values)
    between = (signs.sum(axis=0) ** 2 - (signs**2).sum(axis=0)) / (count * (count - 1))
    return float(between.mean())


def _pair_signs(values: Floats) -> Floats:
    i, j = np.triu_indices(values.shape[1], 1)
    return np.sign(values[:, j] - values[:, i])
