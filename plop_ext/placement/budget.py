"""Placements within a budget of trainable parameters or memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from plop_ext import quantities
from plop_ext.errors import InputError
from plop_ext.placement.cost import WIDTHS
from plop_ext.placement.placement import Placement
from plop_ext.placement.ranks import DEFAULT_RANK, largest_rank
from plop_ext.score_data import ScoreData

# Types are dropped before the rank falls below this value.
MIN_RANK = 8


@dataclass(frozen=True)
class Budget:
    """The limits on the cost of a placement.

    Attributes:
        max_params: Trainable parameters, or None.
        max_bytes: Memory that training adds, or None.
        dtype: Type of the model's weights.
        batch: Samples in a training step.
        seq: Tokens in a sample.
    """

    max_params: int | None
    max_bytes: int | None
    dtype: str
    batch: int
    seq: int

    def fits(self, placement: Placement) -> bool:
        """Return whether `placement`, at its own ranks, is within the budget."""
        if self.max_params is not None and placement.num_parameters() > self.max_params:
            return False
        if self.max_bytes is None:
            return True
        return self.bytes_of(placement) <= self.max_bytes

    def bytes_of(self, placement: Placement) -> int:
        """Predict the memory that training `placement` adds."""
        return placement.cost(self.dtype, self.batch, self.seq).total_bytes

    def __str__(self) -> str:
        parts = [] if self.max_params is None else [f"{self.max_params:,} parameters"]
        if self.max_bytes is not None:
            parts.append(f"{self.max_bytes / 2**20:,.1f} MiB at {self.batch} x {self.seq} tokens")
        return " and ".join(parts)


def make_budget(
    scores: ScoreData, max_params: int | float | str | None, max_memory: int | float | str | None, batch: int, seq: int
) -> Budget | None:
    """Return the requested budget, or None. Fractions refer to the model's parameters, or to its weights' bytes."""
    if max_params is None and max_memory is None:
        return None
    model = scores.provenance["model"]
    dtype = model.get("dtype") or "float32"
    if max_memory is not None and dtype not in WIDTHS:
        raise InputError(
            f"`max_memory`: the model's weights are {dtype}, whose memory cannot be predicted; give `max_params`"
        )
    return Budget(
        _absolute("max_params", max_params, quantities.count_or_share, model.get("parameters")),
        _absolute("max_memory", max_memory, quantities.size_or_share, model.get("weight_bytes")),
        dtype,
        batch,
        seq,
    )


def _absolute(
    name: str, value: int | float | str | None, parse: Callable[[Any, str], int | float], whole: int | None
) -> int | None:
    amount = None if value is None else parse(value, name)
    if not isinstance(amount, float):
        return amount
    if whole is None:
        raise InputError(f"`{name}`={value} is a fraction, but the scores lack the size of the model; give a number")
    return int(amount * whole)


def fit(candidates: Sequence[Callable[[], Placement]], budget: Budget, r: int | None) -> Placement:
    """Return the first candidate that fits the budget at rank `r`.

    Without `r`, a candidate has to fit at rank 8, and is returned at the largest rank that fits. The last candidate
    may have a lower rank, down to 1.

    Raises:
        InputError: If none fits.
    """
    for make in candidates:
        placement = replace(make(), r=r or MIN_RANK)
        if budget.fits(placement):
            return _at_largest_rank(placement, budget) if r is None else placement
    last = candidates[-1]()
    if r is None and budget.fits(replace(last, r=1)):
        return _at_largest_rank(last, budget)
    rank = r or 1
    least = replace(last, r=rank)
    raise InputError(
        f"nothing fits {budget}: `{last.label}` at rank {rank} has {least.num_parameters():,} parameters and adds "
        f"{budget.bytes_of(least) / 2**20:,.1f} MiB; raise the budget, or place fewer modules"
    )


def _at_largest_rank(placement: Placement, budget: Budget) -> Placement:
    """Return `placement` at the largest rank that fits and that every target can use."""
    most = min((target.max_rank for target in placement.lora_targets), default=1)
    return replace(placement, r=largest_rank(most, lambda rank: budget.fits(replace(placement, r=rank))))


def most_types(candidates: Sequence[Callable[[], Placement]], budget: Budget, r: int | None) -> int:
    """Return how many candidates, each one type larger than the last, fit at rank `r` (default 16); at least 1."""
    return max(1, sum(budget.fits(replace(make(), r=r or DEFAULT_RANK)) for make in candidates))
