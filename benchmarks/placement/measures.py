"""Spearman, regret, and how sure they are, over the 35 triples of one table."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from benchmarks.placement.models import TYPES
from benchmarks.placement.placements import TRIPLES

Array = NDArray[np.float64]
_DRAWS = 2000
_SPARED = 1e-9  # below this two correlations are the same

INCIDENCE = np.array([[float(name in triple) for name in TYPES] for triple in TRIPLES])  # [35, 7]
PERMUTATIONS = np.array(list(itertools.permutations(range(len(TYPES)))))  # [5040, 7]


def ranks(values: Array) -> Array:
    """Ranks along the last axis; equal values share their mean rank."""
    largest = np.abs(values).max(-1, keepdims=True, initial=0.0)
    values = np.round(values / np.where(largest > 0, largest, 1.0), 10)  # sums of equal parts are equal
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    result: Array = below + (equal - 1) / 2
    return result


def spearman(first: Array, second: Array) -> Array:
    """Rank correlation along the last axis; 0 where one side is constant."""
    first, second = (each - each.mean(-1, keepdims=True) for each in (ranks(first), ranks(second)))
    scale = np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    result: Array = (first * second).sum(-1) / np.where(scale > 0, scale, np.inf)
    return result


def kendall(first: Array, second: Array) -> float:
    """Kendall's tau: concordant less discordant pairs, over all pairs; a tie is neither."""
    pairs = list(itertools.combinations(range(len(first)), 2))
    agreed = [np.sign(first[one] - first[other]) * np.sign(second[one] - second[other]) for one, other in pairs]
    return float(np.mean(agreed))


def bootstrap(scores: Array, losses: Array, seed: int = 0) -> Array:
    """[D, rules] draws of the correlation of each rule: triples and seeds are drawn anew.

    Args:
        scores: [rules, triples]
        losses: [triples, seeds]
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(_DRAWS):
        triples = rng.integers(len(losses), size=len(losses))
        seeds = rng.integers(losses.shape[1], size=losses.shape[1])
        found.append(spearman(scores[:, triples], -losses[triples][:, seeds].mean(1)))
    return np.array(found)


def interval(draws: Array) -> tuple[float, float]:
    """The middle 95 % of draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def permutation_p(type_scores: Array, losses: Array) -> tuple[Array, Array]:
    """How often an exchange of the types' names gives a correlation as large in size: exact, over all 5040.

    Triples share types, so that shuffling triples would call chance significant; what is shuffled is which type has
    which score.

    Args:
        type_scores: [rules, 7]
        losses: [triples] means over seeds.

    Returns:
        [rules] p of each rule alone, and [rules] p corrected for all rules tried: of the largest of them.
    """
    goal = -losses
    observed = np.abs(spearman(type_scores @ INCIDENCE.T, goal))
    drawn = np.array(
        [np.abs(spearman(scores[PERMUTATIONS] @ INCIDENCE.T, goal)) for scores in type_scores]
    )  # [rules, 5040]
    alone = (drawn >= observed[:, None] - _SPARED).mean(1)
    corrected = (drawn.max(0) >= observed[:, None] - _SPARED).mean(1)
    return alone, corrected


def reliability(losses: Array) -> float:
    """The mean correlation between the orders of two seeds: what no rule can be expected to exceed by much."""
    pairs = list(itertools.combinations(range(losses.shape[1]), 2))
    return float(np.mean([spearman(losses[:, first], losses[:, second]) for first, second in pairs]))


def regret(losses: Array, other: Array, seed: int = 0) -> tuple[float, float, float]:
    """The mean loss of one placement above that of another, and its 95 % interval over seeds, which are paired."""
    difference = losses - other
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(difference), size=(_DRAWS, len(difference)))
    return float(difference.mean()), *interval(difference[drawn].mean(1))
