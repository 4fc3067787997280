"""Agreement of resamples: the set of the k lowest, the order of neighbours, Kendall's tau."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from plop_ext.statistics.table import Floats


def set_holds(values: Floats) -> Floats:
    """Return [n - 1] for k = 1 .. n - 1: the share of resamples whose k lowest are the first k columns.

    Args:
        values: [R, n] resampled values, the column with the lowest estimate first.
    """
    highest_inside = np.maximum.accumulate(values, axis=1)[:, :-1]
    lowest_outside = np.minimum.accumulate(values[:, ::-1], axis=1)[:, ::-1][:, 1:]
    return (highest_inside < lowest_outside).mean(axis=0)


def among_lowest(values: Floats, k: int) -> Floats:
    """Return [n]: the share of resamples in which each column is among the k lowest."""
    return (_ranks(values) < k).mean(axis=0)


def neighbours_hold(values: Floats) -> Floats:
    """Return [n - 1]: the share of resamples in which column i is below column i + 1."""
    return (values[:, :-1] < values[:, 1:]).mean(axis=0)


def tau_between(first: Floats, second: Floats) -> Floats:
    """Return [R]: Kendall's tau between the orders of two [R, n] tables, row by row; a table may be a single row."""
    signs = [_pair_signs(values) for values in (first, second)]
    return (signs[0] * signs[1]).mean(axis=1)


def same_lowest(first: Floats, second: Floats) -> Floats:
    """Return [n - 1] for k = 1 .. n - 1: the share of rows in which two [R, n] tables have the same k lowest."""
    cuts = np.arange(1, first.shape[1])[:, None, None]
    return ((_ranks(first) < cuts) == (_ranks(second) < cuts)).all(axis=2).mean(axis=1)


def mean_tau(values: Floats) -> float:
    """Return the mean Kendall's tau between two different resamples of [R, n]."""
    if values.shape[1] < 2:
        return 1.0
    signs = _pair_signs(values)
    count = len(values)
    between = (signs.sum(axis=0) ** 2 - (signs**2).sum(axis=0)) / (count * (count - 1))
    return float(between.mean())


def _ranks(values: Floats) -> NDArray[np.int64]:
    """Return [R, n] ranks in each row, from 0; of equal values the first is the lower."""
    return values.argsort(kind="stable").argsort()


def _pair_signs(values: Floats) -> Floats:
    i, j = np.triu_indices(values.shape[1], 1)
    return np.sign(values[:, j] - values[:, i])
