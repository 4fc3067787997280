"""Ranks of targets: a single rank, or one for each target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from plop_ext.arguments import check_whole
from plop_ext.errors import InputError
from plop_ext.lora_target import LoraTarget

DEFAULT_RANK = 16


def largest_rank(most: int, fits: Callable[[int], bool]) -> int:
    """Find the largest rank from 1 to `most` that fits, or 0, given that every lower rank fits too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def inverse_nfn(
    caps: Mapping[str, int], nfn: Mapping[str, float], fits: Callable[[dict[str, int]], bool]
) -> dict[str, int] | None:
    """Find ranks floor(c / NFN), at least 1, at the largest c that fits; None if rank 1 does not fit.

    Args:
        caps: Name of each target to its largest rank.
        nfn: Name of each target to its NFN.
        fits: Predicate: whether the ranks, by name, fit.
    """

    def at(scale: float) -> dict[str, int]:
        return {name: max(1, min(int(scale / nfn[name]), cap)) for name, cap in caps.items()}

    if not fits(at(0.0)):
        return None
    low, high = 0.0, max(nfn[name] * (cap + 1) for name, cap in caps.items())
    # After 60 halvings, the interval is too small to change a whole-numbered rank.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    return at(low)


def most_common(ranks: Mapping[str, int]) -> int:
    """Return the rank that most targets have; of several, the highest."""
    counts = Counter(ranks.values())
    return max(counts, key=lambda rank: (counts[rank], rank))


def check_rank(r: int | None, targets: Iterable[LoraTarget] = ()) -> None:
    """Check that a rank is at least 1, and at most the largest that an update of one of the targets can have.

    A rank above that of a smaller target costs parameters without a use, but a single rank for all is common.
    """
    check_whole(r=r)
    widest = max((target.max_rank for target in targets), default=None)
    if r is None or widest is None:
        return
    most = max(widest, DEFAULT_RANK)
    if r > most:
        raise InputError(f"`r` must be at most {most}, got {r}: an update of the largest target has rank {widest}")
