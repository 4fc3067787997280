"""The streams of a batch: given how many rows a module reads, whose are they, and which of them count?

A stream has the layout of its rows from the batch. A module that reads another number of rows than the layout allows
is answered by a reason, never by a guess.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Upper limit on class and register tokens that a vision tower adds to each image of its own size.
_MOST_ADDED = 16


class Rows(NamedTuple):
    """The rows of one call.

    Attributes:
        starts: [S + 1] int64 on the CPU, ascending: sample s owns the rows from starts[s] to starts[s + 1]. Rows
            before the first and after the last start belong to no sample.
        counted: [R] bool, on any device; None if all rows count.
        exact: Whether these are as many rows as the batch tells, and not a number that only pooled, merged or added
            rows explain.
    """

    starts: Tensor
    counted: Tensor | None
    exact: bool = True


class Stream(Protocol):
    """A stream of rows of one batch."""

    def rows(self, rows: int, extents: Sequence[int] = ()) -> Rows | str:
        """Return the layout of `rows` rows, or why it cannot be told: a phrase that follows "its 12 input rows".

        Args:
            rows: R.
            extents: Of the input of one sequence or item, such as (heads, T), whose product is its number of rows;
                empty if they are not known.
        """


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token sequences, padded to [B, T]; several samples may be packed into one row.

    Attributes:
        shape: (B, T).
        counted: [B, T] bool; None if every token counts.
        packed: [S + 1] int64 on the CPU, where each sample starts in the flattened [B * T]; None if row b is sample b.
        layouts: [B, L] bool each, which rows count where a model adds rows to each sequence.
        latents: Numbers of learned rows per sequence, which are no tokens.
    """

    shape: tuple[int, int]
    counted: Tensor | None = None
    packed: Tensor | None = None
    layouts: Sequence[Tensor] = ()
    latents: Collection[int] = ()

    @property
    def samples(self) -> int:
        return self.shape[0] if self.packed is None else len(self.packed) - 1

    def time_first(self, shape: torch.Size) -> bool:
        """Return whether an input of `shape` is [T, B, K]; if T = B, assume [B, T, K]."""
        size, length = self.shape
        return len(shape) == 3 and size != length and tuple(shape[:2]) == (length, size)

    def rows(self, rows: int, extents: Sequence[int] = ()) -> Rows | str:
        size, length = self.shape
        if self.packed is not None:
            if rows == size * length:
                return Rows(self.packed, self._flat(self.counted))
            return f"are not the {size * length} tokens of the packed batch"
        if size == 0 or rows % size:
            return f"cannot be assigned to {self.samples} samples"
        each = rows // size
        starts = torch.arange(size + 1) * each
        # Pooled and learned rows belong to a whole sequence.
        found = [self._flat(layout) for layout in self.layouts if each == layout.shape[1]]
        found += [None] * (each in self.latents) + [self._flat(self.counted)] * (each == length)
        repeated = None if found or self.counted is None else _repeated(self.counted, extents)
        if repeated is not None and repeated.numel() == rows:  # each head of a token, or each element of its vector
            return Rows(starts, repeated.reshape(-1))
        if not found and (each == 1 or self.counted is None or bool(self.counted.all())):
            return Rows(starts, None, exact=False)
        if not found:  # made of several tokens each, of which some are padding
            return f"are not the {size * length} tokens of the batch, of which some are masked"
        first, *others = (Rows(starts, counted) for counted in found)
        return first if all(_equal(first, other) for other in others) else "may be tokens or learned rows"

    @staticmethod
    def _flat(counted: Tensor | None) -> Tensor | None:
        return None if counted is None else counted.reshape(-1)


@dataclass(frozen=True, eq=False)
class Equal:
    """The rows of a batch of which only the number of samples is known; each sample has the same number."""

    samples: int

    def rows(self, rows: int, extents: Sequence[int] = ()) -> Rows | str:
        if rows % self.samples:
            return f"cannot be assigned to {self.samples} samples"
        return Rows(torch.arange(self.samples + 1) * (rows // self.samples), None, exact=False)


@dataclass(frozen=True, eq=False)
class Items:
    """Images, videos or sound clips, in the order in which the tower reads them.

    Attributes:
        what: "images", "videos" or "clips", for messages.
        count: [S] int64 on the CPU, how many each sample has.
        sizes: [S] int64 on the CPU, rows of the items of each sample before any are merged; None if all items have the
            same number of rows.
        flags: [N, P] bool for N items: layouts with padding.
        padded: Whether items are padded, so that only a layout of `flags` tells which rows count.
        latents: Numbers of learned rows per item.
    """

    what: str
    count: Tensor
    sizes: Tensor | None = None
    flags: Sequence[Tensor] = ()
    padded: bool = False
    latents: Collection[int] = ()

    def rows(self, rows: int, extents: Sequence[int] = ()) -> Rows | str:
        items = int(self.count.sum())
        if items == 0:
            return f"come from no {self.what} of the batch" if rows else Rows(_cumulated(self.count), None)
        for flags in self.flags:
            if rows == flags.numel():
                return Rows(_cumulated(self.count * flags.shape[1]), flags.reshape(-1))
            repeated = _repeated(flags, extents)
            if repeated is not None and repeated.numel() == rows:
                return Rows(_cumulated(self.count * repeated.shape[1]), repeated.reshape(-1))
        for flags in self.flags:
            if rows == int(flags.sum()):
                per_item = flags.sum(dim=1).cpu()
                return Rows(_cumulated(per_item)[_cumulated(self.count)], None)
        if self.sizes is not None:
            found = _merged(self.sizes, rows)
            added, rest = divmod(rows - int(self.sizes.sum()), items)
            if found is None and rest == 0 and 0 < added <= _MOST_ADDED:
                found = _cumulated(self.sizes + added * self.count)
            if found is not None:
                return Rows(found, None, exact=added == rest == 0)
        each, rest = divmod(rows, items)
        if rest == 0 and (each == 1 or each in self.latents or (self.sizes is None and not self.padded)):
            return Rows(_cumulated(self.count * each), None, exact=False)
        return f"do not fit the {items} {self.what} of the batch"


@dataclass(frozen=True, eq=False)
class Untold:
    """A stream whose rows the batch does not tell.

    Attributes:
        reason: Why.
    """

    reason: str

    def rows(self, rows: int, extents: Sequence[int] = ()) -> Rows | str:
        return self.reason


@dataclass(frozen=True, eq=False)
class Among:
    """Rows of one of several streams, of which their number decides: first the streams that have exactly as many.

    Attributes:
        streams: At least one.
    """

    streams: Sequence[Stream] = field(default_factory=tuple)

    def rows(self, rows: int, extents: Sequence[int] = ()) -> Rows | str:
        answers = [stream.rows(rows, extents) for stream in self.streams]
        found = [answer for answer in answers if isinstance(answer, Rows)]
        if not found:
            return next(answer for answer in answers if isinstance(answer, str))
        first, *others = [answer for answer in found if answer.exact] or found
        if all(_equal(first, other) for other in others):
            return first
        return "fit several streams of the model with other samples or other padding"


def _repeated(flags: Tensor, extents: Sequence[int]) -> Tensor | None:
    """Return [N, R] bool: the flags of the rows of an input [N, *extents, K]; None unless one extent alone is P.

    Args:
        flags: [N, P] bool.
        extents: Two or more, as of the heads of each token, or of the tokens of each head.
    """
    size, length = flags.shape
    if len(extents) < 2 or list(extents).count(length) != 1:
        return None
    axis = list(extents).index(length)
    shape = [length if number == axis else 1 for number in range(len(extents))]
    return flags.view(size, *shape).expand(size, *extents).reshape(size, -1)


def _cumulated(counts: Tensor) -> Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _merged(sizes: Tensor, rows: int) -> Tensor | None:
    """Return where samples start if `rows` rows are in proportion to `sizes`; None if they cannot be."""
    shares = sizes * rows
    total = int(sizes.sum())
    return None if total == 0 or (shares % total).any() else _cumulated(shares // total)


def _equal(first: Rows, second: Rows) -> bool:
    if not torch.equal(first.starts, second.starts):
        return False
    if first.counted is None or second.counted is None:
        return all(rows.counted is None or bool(rows.counted.all()) for rows in (first, second))
    return torch.equal(first.counted, second.counted)
