"""Ranks: one for all modules or one each, and how PEFT is told."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from plop_ext.errors import InputError
from plop_ext.placement.placement import Placement

DEFAULT_RANK = 16


def rank_cap(placement: Placement) -> int:
    """The rank above which the smallest target gains nothing: an update of W has at most min(K, M)."""
    return min((min(target.shape[-2:]) for target in placement.lora_targets), default=1)


def largest_rank(placement: Placement, fits: Callable[[Placement], bool]) -> Placement | None:
    """`placement` at the largest common rank that fits, or None if rank 1 does not. Cost grows with rank."""
    low, high = 0, rank_cap(placement)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(replace(placement, r=middle, ranks={})):
            low = middle
        else:
            high = middle - 1
    return replace(placement, r=low, ranks={}) if low else None


def inverse_nfn(placement: Placement, nfn: Mapping[str, float], fits: Callable[[Placement], bool]) -> Placement | None:
    """`placement` with ranks floor(c / NFN) at the largest c that fits, at least 1; None if rank 1 does not fit.

    Args:
        placement: What to rank.
        nfn: Name of each of its targets to their NFN.
        fits: Whether a placement fits.
    """
    caps = {target.name: min(target.shape[-2:]) for target in placement.lora_targets}

    def at(scale: float) -> Placement:
        ranks = {name: max(1, min(int(scale / nfn[name]), cap)) for name, cap in caps.items()}
        common = max(set(ranks.values()), key=lambda rank: (list(ranks.values()).count(rank), rank))
        return replace(placement, r=common, ranks=ranks)

    if not fits(at(0.0)):
        return None
    low, high = 0.0, max(nfn[name] * (cap + 1) for name, cap in caps.items())
    # Ranks are whole numbers: 60 halvings leave less between the two than any rank can tell.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    return at(low)


def rank_pattern(ranks: Mapping[str, int], common: int) -> dict[str, int]:
    """PEFT's `rank_pattern`: one alternation of escaped full names per rank other than `common`.

    PEFT tries the keys of the pattern on every module; one key per module takes minutes on a large model.
    """
    names: dict[int, list[str]] = {}
    for name, rank in ranks.items():
        if rank != common:
            names.setdefault(rank, []).append(re.escape(name))
    return {"|".join(group): rank for rank, group in sorted(names.items())}


def alpha_pattern(ranks: Mapping[str, int], scale: float) -> dict[str, float]:
    """PEFT's `alpha_pattern` for a `rank_pattern`: alpha / r is `scale` everywhere; whole numbers stay whole."""
    alphas = {key: rank * scale for key, rank in ranks.items()}
    return {key: int(alpha) if alpha == int(alpha) else alpha for key, alpha in alphas.items()}


def check_rank(r: int | None) -> None:
    """Refuse a rank below 1."""
    if r is not None and r < 1:
        raise InputError(f"`r` must be at least 1, got {r}")
