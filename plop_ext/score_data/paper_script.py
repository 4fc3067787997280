"""The numbers of the script published with the paper (arXiv 2506.20629), which differ from the definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from plop_ext.errors import InputError
from plop_ext.score_data.modules import ScoredModule
from plop_ext.totals import Totals

# The published script's list, matched as substrings of module names.
PAPER_GROUPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")


def gain(totals: Totals, sample_batches: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return [M] mean over the batches' means, without weights; zero inputs count as gain zero."""
    counted = totals.tokens + totals.skipped_zero
    members = [sample_batches == batch for batch in np.unique(sample_batches)]
    gains = np.array([totals.sum_gain[:, member].sum(axis=1) for member in members])
    tokens = np.array([counted[:, member].sum(axis=1) for member in members])
    # A batch that did not call a module has no mean of it: it adds 0, and is not counted.
    return (gains / np.maximum(tokens, 1)).sum(axis=0) / (tokens > 0).sum(axis=0)


def groups(names: Sequence[str]) -> dict[str, list[int]]:
    """Return the positions of the modules of each group; a module can be in several, or in none."""
    found = {group: [i for i, name in enumerate(names) if group in name] for group in PAPER_GROUPS}
    return {group: members for group, members in found.items() if members}


def group_nfn(
    modules: Sequence[ScoredModule], gain: NDArray[np.float64], members: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Map each group to the ratio of its sums of the script's `actual` and `random`.

    Both are scaled by each module's RMS weight.

    Args:
        modules: The M scored modules.
        gain: [M] their gains.
        members: Each group to the positions of its modules.

    Raises:
        InputError: If the weight norm of a member is unknown.
    """
    values = {}
    for group, positions in members.items():
        rms = np.array([weight_rms(modules[i]) for i in positions])
        baselines = np.array([modules[i].baseline for i in positions])
        values[group] = float((gain[list(positions)] / rms).sum() / (baselines / rms).sum())
    return values


def metrics(modules: Sequence[ScoredModule], gain: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """Compute `actual` and `random` of each module at the script's scale: gain over RMS(W) and over K."""
    found = {}
    for module, value in zip(modules, gain, strict=True):
        scale = 1.0 / (weight_rms(module) * module.in_features)
        found[module.name] = {"actual": float(value * scale), "random": module.baseline * scale}
    return found


def weight_rms(module: ScoredModule) -> float:
    """Return the root mean square of the weight."""
    if module.weight_norm is None:
        raise InputError(f"the weight norm of `{module.name}` is unknown; the published script's scale needs it")
    return module.weight_norm / (module.in_features * module.out_features) ** 0.5
