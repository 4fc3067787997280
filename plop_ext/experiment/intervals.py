"""The difference of two placements on the same rows with the same seeds, with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from plop_ext.statistics.resampling import resample_counts, t_quantile, widening

RESAMPLES = 4000
# What more rows or seeds are predicted for; beyond it the difference is out of reach.
_MOST_SEEDS = 100


@dataclass(frozen=True)
class Difference:
    """A difference of two mean losses, in nats per token; negative if the first is better.

    Attributes:
        mean: The difference over all rows and seeds.
        low: Lower end of the interval.
        high: Upper end of the interval.
        confidence: Coverage of the interval.
        over_rows: Half-width of the interval that the rows alone give.
        over_seeds: Half-width that the seeds alone give; NaN for one seed.
        rows: Number of rows.
        seeds: Number of seeds.
    """

    mean: float
    low: float
    high: float
    confidence: float
    over_rows: float
    over_seeds: float
    rows: int
    seeds: int

    @property
    def known(self) -> bool:
        """Whether both spreads are known: one seed or one row shows none."""
        return math.isfinite(self.over_rows) and math.isfinite(self.over_seeds)

    def needed(self, margin: float) -> tuple[int, int] | None:
        """Predict the rows and seeds with which a difference of this size would be decided.

        A difference is decided once the half-width of its interval is below its size, or below its distance from the
        margin. Rows and seeds get equal parts of that half-width.

        Args:
            margin: Largest difference that counts as none.

        Returns:
            Rows and seeds, at least those there are, or None if they are out of reach or the spread is unknown.
        """
        goal = max(abs(self.mean), margin - abs(self.mean)) / math.sqrt(2)
        if not self.known or goal <= 0:
            return None
        rows = max(self.rows, math.ceil(self.rows * (self.over_rows / goal) ** 2))
        upper = 0.5 + self.confidence / 2
        deviation = self.over_seeds * math.sqrt(self.seeds) / t_quantile(upper, self.seeds - 1)
        for seeds in range(self.seeds, _MOST_SEEDS + 1):
            if t_quantile(upper, seeds - 1) * deviation / math.sqrt(seeds) <= goal:
                return rows, seeds
        return None


def difference(nats: ArrayLike, reference: ArrayLike, tokens: ArrayLike, confidence: float, seed: int) -> Difference:
    """Compare two placements by a bootstrap over rows and a t distribution over seeds.

    Both placements were measured on the same rows with the same seeds, and are compared pair by pair. The deviations
    of the two parts are added draw by draw: rows are resampled with all seeds (with the widening of
    `plop_ext.statistics.resampling.widening` for few rows), and the mean over the seeds varies as a mean of normal
    values, because a bootstrap of three or five seeds is far too narrow.

    Args:
        nats: [S, n] summed loss of each row for each seed.
        reference: [S, n] the same of the reference.
        tokens: [n] counted tokens of each row.
        confidence: Coverage of the interval.
        seed: Seed of the resamples.
    """
    change = np.asarray(nats, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    weights = np.asarray(tokens, dtype=np.float64)
    n_seeds, n_rows = change.shape
    by_seed = change.sum(axis=1) / weights.sum()
    mean = float(by_seed.mean())
    rows = np.full(RESAMPLES, math.nan)
    if n_rows > 1:
        counts = resample_counts(n_rows, RESAMPLES, seed)
        rows = widening(n_rows, confidence) * ((counts @ change.mean(axis=0)) / (counts @ weights) - mean)
    seeds = np.zeros(RESAMPLES)
    half = math.nan
    if n_seeds > 1:
        scale = float(by_seed.std(ddof=1)) / math.sqrt(n_seeds)
        seeds = scale * np.random.default_rng(seed + 1).standard_t(n_seeds - 1, RESAMPLES)
        half = scale * t_quantile(0.5 + confidence / 2, n_seeds - 1)
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    low, high = np.quantile(mean + rows + seeds, tails)
    from_rows = np.quantile(rows, tails)
    return Difference(
        mean,
        float(low),
        float(high),
        confidence,
        float(from_rows[1] - from_rows[0]) / 2,
        half,
        n_rows,
        n_seeds,
    )
