"""Bootstraps over samples and over layers, leave-one-layer-out, and random halves."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from plop_ext.statistics.table import Floats, GainTable

RESAMPLES = 1000
CONFIDENCE = 0.95


def modules_over_samples(table: GainTable, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Return [R, M] NFN of each module over bootstrap resamples of whole samples, widened (`widening`)."""
    point = table.module_nfn(table.all_samples)
    drawn = table.module_nfn(resample_counts(table.samples, resamples, seed))
    return _widen(point, drawn, table.samples)


def types_over_samples(table: GainTable, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Return [R, T] NFN of each type over bootstrap resamples of whole samples, widened.

    The unit is the sample, because the tokens of one sample are correlated. The estimator is that of the scores: the
    sum of the gains over the number of tokens, per module.
    """
    point = table.type_nfn(table.all_samples)
    drawn = table.type_nfn(resample_counts(table.samples, resamples, seed))
    return _widen(point, drawn, table.samples)


def types_over_layers(table: GainTable, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Return [R, T] NFN of each type over bootstrap resamples of whole layers, widened.

    Types with modules in the same layers share the resamples: q and k of one block are compared with each other. Types
    of other layers (the second kind of block of a hybrid model) are resampled separately. A type in a single layer
    keeps its value.
    """
    _, sums, counts = table.layer_sums()
    point = (sums.sum(axis=1) / counts.sum(axis=1))[None, :]
    result = np.repeat(point, resamples, axis=0)
    present = counts > 0
    for number, pattern in enumerate(np.unique(present, axis=0)):
        members = np.flatnonzero((present == pattern).all(axis=1))
        n_layers = int(pattern.sum())
        if n_layers < 2:
            continue
        weights = resample_counts(n_layers, resamples, seed + 1 + number)
        drawn = (weights @ sums[np.ix_(members, pattern)].T) / (weights @ counts[np.ix_(members, pattern)].T)
        result[:, members] = _widen(point[:, members], drawn, n_layers)
    return result


def without_each_layer(table: GainTable) -> Floats:
    """Return [L, T] NFN of each type without the modules of one layer; a type in that layer only keeps its value."""
    _, sums, counts = table.layer_sums()
    point = sums.sum(axis=1) / counts.sum(axis=1)
    left = counts.sum(axis=1, keepdims=True) - counts
    values = np.divide(
        sums.sum(axis=1, keepdims=True) - sums, left, out=np.repeat(point[:, None], left.shape[1], 1), where=left > 0
    )
    return values.T


def halves(table: GainTable, splits: int = 200, seed: int = 0) -> tuple[Floats, Floats]:
    """Return two [splits, T] tables: NFN on a random half of the samples, and NFN on the other half."""
    rng = np.random.default_rng(seed)
    ranks = rng.random((splits, table.samples)).argsort()
    first = np.where(ranks < table.samples // 2, 1.0, 0.0)
    return table.type_nfn(first), table.type_nfn(1.0 - first)


def resample_counts(n: int, resamples: int, seed: int) -> Floats:
    """Return [R, n]: how often each of n units occurs in each of R bootstrap resamples of size n."""
    return counts_of_draws(np.random.default_rng(seed), n, resamples, n)


def counts_of_draws(rng: np.random.Generator, n: int, resamples: int, size: int) -> Floats:
    """Return [R, n]: how often each of n units occurs in each of R resamples of another size, with replacement."""
    units = rng.integers(n, size=(resamples, size)) + n * np.arange(resamples)[:, None]
    return np.bincount(units.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def widening(n: int, confidence: float = CONFIDENCE) -> float:
    r"""Return the factor that makes a bootstrap interval of n units as wide as a t interval.

    The factor is \(\sqrt{n / (n - 1)} \; t_{n-1} / z\), because a bootstrap uses the plug-in variance, and n units
    estimate their own spread only roughly. It is 1.87 for 4 units, 1.22 for 10, 1.03 for 64.
    """
    if n < 2:
        return math.nan
    upper = 0.5 + confidence / 2
    return math.sqrt(n / (n - 1)) * t_quantile(upper, n - 1) / NormalDist().inv_cdf(upper)


def t_quantile(p: float, degrees: int) -> float:
    """Return the quantile of Student's t: exact for 1 and 2 degrees of freedom, then by Cornish-Fisher (to 0.2 %)."""
    if degrees == 1:
        return -1 / math.tan(math.pi * p)
    if degrees == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))


def interval(values: Floats, confidence: float = CONFIDENCE) -> Floats:
    """Return [2, ...] lower and upper percentile over the first axis."""
    tail = (1 - confidence) / 2
    return np.nanquantile(values, (tail, 1 - tail), axis=0)


def _widen(point: Floats, drawn: Floats, n: int) -> Floats:
    """Move resampled values away from the estimate, on the logarithm: NFN is a ratio of norms and stays positive."""
    if n < 2:  # one unit says nothing of the spread
        return np.full_like(drawn, np.nan)
    # A resample in which a module has no tokens carries no information on its spread.
    ratio = np.divide(drawn, point, out=np.ones_like(drawn), where=np.isfinite(drawn) & (point > 0))
    return point * ratio ** widening(n)
