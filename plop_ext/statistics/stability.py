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
    """Return [R]: Kendall's tau between the orders of two [R, n] tables, row by row; a table may be a single row.

    Concordant less discordant pairs, over all pairs: a pair that is tied in either table counts as neither.
    """
    first, second = np.broadcast_arrays(first, second)
    n = first.shape[1]
    pairs = n * (n - 1) / 2
    rows = np.arange(len(first))[:, None]
    order = np.lexsort((second, first), axis=1)
    discordant = _inversions(second[rows, order])
    tied = np.array([_tied(one) + _tied(other) - _tied(one, other) for one, other in zip(first, second, strict=True)])
    return (pairs - tied - 2 * discordant) / pairs


def same_lowest(first: Floats, second: Floats) -> Floats:
    """Return [n - 1] for k = 1 .. n - 1: the share of rows in which two [R, n] tables have the same k lowest."""
    ranks = _ranks(second)[np.arange(len(first))[:, None], first.argsort(kind="stable")]
    # The k lowest of the first table are those of the second if none of them has a rank there of k or more.
    return (np.maximum.accumulate(ranks, axis=1)[:, :-1] == np.arange(first.shape[1] - 1)).mean(axis=0)


def mean_tau(values: Floats) -> float:
    """Return the mean Kendall's tau between two different resamples of [R, n]."""
    count, n = values.shape
    if n < 2:
        return 1.0
    columns = np.ascontiguousarray(values.T)
    between = 0
    for i in range(n - 1):
        rises = (columns[i + 1 :] > columns[i]).sum(axis=1)
        falls = (columns[i + 1 :] < columns[i]).sum(axis=1)
        # The products of two different resamples' signs, from their sum and number.
        between += int(((rises - falls) ** 2 - (rises + falls)).sum())
    return between / (count * (count - 1)) / (n * (n - 1) / 2)


def _ranks(values: Floats) -> NDArray[np.int64]:
    """Return [R, n] ranks in each row, from 0; of equal values the first is the lower."""
    return values.argsort(kind="stable").argsort()


def _inversions(values: Floats) -> Floats:
    """Return [R]: the pairs in each row of [R, n] of which the first is greater, by merging sorted halves."""
    rows, n = values.shape
    width = 1
    size = 1 << max(n - 1, 0).bit_length()
    merged = np.full((rows, size), np.inf)
    merged[:, :n] = values
    found = np.zeros(rows)
    while width < size:
        halves = merged.reshape(rows, -1, 2 * width)
        order = halves.argsort(axis=2, kind="stable")
        # The elements of the left half before one of the right half, in order, are those not above it.
        right = order >= width
        found += (right * (width - np.cumsum(~right, axis=2))).sum(axis=(1, 2))
        merged = np.take_along_axis(halves, order, axis=2).reshape(rows, size)
        width *= 2
    return found


def _tied(*values: Floats) -> float:
    """Return how many pairs of positions are equal in all of these arrays [n]."""
    _, counts = np.unique(np.stack(values), axis=1, return_counts=True)
    return float((counts * (counts - 1) / 2).sum())
