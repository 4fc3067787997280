"""Scores of single samples: how strongly each module responds to each prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plop_ext.totals import Totals


@dataclass(frozen=True, eq=False)
class SampleScores:
    """NFN of every module and type on every sample.

    Attributes:
        ids: [S] id of each sample, in the order of the run.
        data: [S] name of the data of each sample, or None.
        modules: M module names.
        types: T labels of the types that are candidates for LoRA, lowest NFN over all samples first.
        tokens: [M, S] counted tokens.
        nfn: [M, S] mean over the sample's counted tokens of gain over baseline; NaN without any.
        nfn_std: [M, S] standard deviation of the same over the sample's tokens.
        type_nfn: [T, S] mean over the type's modules that counted a token.
    """

    ids: NDArray[np.int64]
    data: tuple[str | None, ...]
    modules: tuple[str, ...]
    types: tuple[str, ...]
    tokens: NDArray[np.int64]
    nfn: NDArray[np.float64]
    nfn_std: NDArray[np.float64]
    type_nfn: NDArray[np.float64]


def token_moments(totals: Totals, baseline: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Return [M, S] mean and standard deviation over tokens of gain over baseline; NaN where no token counts."""
    tokens = np.where(totals.tokens > 0, totals.tokens, np.nan)
    mean = totals.sum_gain / tokens
    variance = np.maximum(totals.sum_gain_sq / tokens - mean**2, 0.0)
    return mean / baseline[:, None], np.sqrt(variance) / baseline[:, None]
