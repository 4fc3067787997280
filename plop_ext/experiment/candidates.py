"""The placements that compete, and the ranks at which they have equally many trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from plop_ext.errors import InputError
from plop_ext.placement.ranks import largest_rank

if TYPE_CHECKING:
    from plop_ext.placement import Placement
    from plop_ext.placement.budget import Budget
    from plop_ext.scores import Scores

# A type is uncertain at the cut if it changes sides in this share of the resamples of the samples or of the layers.
_UNCERTAIN = 0.05
# Each neighbour costs as many trials as PLoP's own placement.
_MAX_NEIGHBOURS = 2
# Ranks are whole numbers, so that equal parameters means equal within this share.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Candidate:
    """A placement in the experiment.

    Attributes:
        placement: The modules.
        r: Rank of all modules.
        why: Reason why it competes.
    """

    placement: Placement
    r: int
    why: str

    @property
    def label(self) -> str:
        """Name of the placement, which is its name in the experiment."""
        return self.placement.label

    @property
    def params(self) -> int:
        """Number of trainable parameters."""
        return self.placement.num_parameters(self.r)


@dataclass(frozen=True)
class Entry:
    """A placement that will compete, before its rank is known, and the reason."""

    placement: Placement
    why: str


def reference(scores: Scores) -> Entry:
    """Return all-linear, with which every other candidate is compared."""
    return Entry(scores.place(strategy="all"), "reference: every linear layer inside the blocks")


def proposals(scores: Scores) -> list[Entry]:
    """Return PLoP's placement and its neighbours: sets that differ in a type whose side of the cut is uncertain.

    Without signal in the scores there is no such placement, and the list is empty.
    """
    if not scores.placeable:
        return []
    chosen = scores.place()
    found = [Entry(chosen, f"PLoP: the {len(chosen.types)} types with the lowest NFN")]
    for inside, outside in _uncertain_pairs(scores, chosen.types):
        types = [label for label in scores.types if label in chosen.types and label != inside] + [outside]
        placement = replace(scores.place(types), label=f"{chosen.label} with {outside} for {inside}")
        found.append(Entry(placement, f"neighbour: the order of {inside} and {outside} is uncertain"))
    return found[: 1 + _MAX_NEIGHBOURS]


def _uncertain_pairs(scores: Scores, chosen: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of an uncertain type inside and one outside of the chosen set, the closest in NFN first."""
    statistics = {item.type: item for item in scores.statistics(len(chosen)).types}

    def share(label: str) -> tuple[float, float]:
        item = statistics[label]
        known = [item.p_layers] if item.p_samples is None else [item.p_samples, item.p_layers]
        return min(known), max(known)

    inside = [label for label in chosen if share(label)[0] < 1 - _UNCERTAIN]
    outside = [label for label in scores.types if label not in chosen and share(label)[1] > _UNCERTAIN]
    pairs = [(one, other) for one in inside for other in outside]
    return sorted(pairs, key=lambda pair: statistics[pair[1]].nfn / statistics[pair[0]].nfn)


def without_repetitions(entries: Sequence[Entry], asked: bool) -> list[Entry]:
    """Return the entries with different modules and labels, each once.

    Args:
        entries: The entries, the most important first.
        asked: Whether the user named them, so that a repetition is a mistake.

    Raises:
        InputError: If the user named the same modules twice.
    """
    kept: list[Entry] = []
    for entry in entries:
        twin = next((one for one in kept if set(one.placement.modules) == set(entry.placement.modules)), None)
        if twin is None:
            kept.append(entry)
        elif asked:
            raise InputError(
                f"`placements` holds the same modules twice, as {twin.placement.label} and {entry.placement.label};"
                " remove one"
            )
    labels = [entry.placement.label for entry in kept]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"`placements` holds two placements with the label {label}; change the label of one")
    return kept


def match(entries: Sequence[Entry], r: int, budget: Budget | None) -> list[Candidate]:
    """Give each placement a rank, so that all have equally many trainable parameters.

    Without a budget, the first placement has rank `r`, or the next higher rank at which whole-numbered ranks match the
    others within 2 %; if there is none, the rank with the smallest difference. With a budget, each has the largest
    rank that fits. A rank never exceeds the smaller width of a module, because a higher one adds nothing; a placement
    of narrow modules can therefore have fewer parameters.

    Args:
        entries: The placements, the reference first.
        r: Rank of the reference.
        budget: Limit on the parameters and the memory of each placement.

    Raises:
        InputError: If a placement does not fit the budget even at rank 1, or PEFT can adapt nothing of one.
    """
    placements = [entry.placement for entry in entries]
    for placement in placements:
        placement.check_not_empty()
    if budget is not None:
        ranks = [_largest(placement, budget) for placement in placements]
    else:
        first = min(r, _cap(placements[0]))
        tried = [_ranks_at(placements, anchor) for anchor in range(first, min(2 * first, _cap(placements[0])) + 1)]
        good = [ranks for ranks in tried if _mismatch(placements, ranks) <= TOLERANCE]
        ranks = good[0] if good else min(tried, key=lambda ranks: _mismatch(placements, ranks))
    return [Candidate(entry.placement, rank, entry.why) for entry, rank in zip(entries, ranks, strict=True)]


def mismatch(candidates: Sequence[Candidate]) -> float:
    """Return the largest relative difference in trainable parameters from the first candidate."""
    return _mismatch([item.placement for item in candidates], [item.r for item in candidates])


def _largest(placement: Placement, budget: Budget) -> int:
    """Return the largest rank within a budget."""
    if budget.max_params is not None:
        placement.rank_for(budget.max_params)  # refuses what does not fit at rank 1
    rank = largest_rank(_cap(placement), lambda r: budget.fits(replace(placement, r=r, ranks={})))
    if rank < 1:
        least = budget.bytes_of(replace(placement, r=1, ranks={})) / 2**20
        raise InputError(
            f"`max_memory` is too small for `{placement.label}`: rank 1 adds {least:,.1f} MiB in training; raise it,"
            " or lower the batch size"
        )
    return rank


def _ranks_at(placements: Sequence[Placement], anchor: int) -> list[int]:
    allowed = placements[0].num_parameters(anchor)
    nearest = [max(1, round(allowed / placement.num_parameters(1))) for placement in placements]
    return [min(rank, _cap(placement)) for rank, placement in zip(nearest, placements, strict=True)]


def _mismatch(placements: Sequence[Placement], ranks: Sequence[int]) -> float:
    counts = [placement.num_parameters(rank) for placement, rank in zip(placements, ranks, strict=True)]
    return max(abs(count - counts[0]) for count in counts) / counts[0]


def _cap(placement: Placement) -> int:
    return min(target.max_rank for target in placement.lora_targets)
