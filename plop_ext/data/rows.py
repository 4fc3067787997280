"""Rows of a data set, and where each of them was found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]


class Place(NamedTuple):
    """Where a row was found, for messages: a file or data set, and its line, item or row there, counted from 1."""

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        where = f"{self.unit} {self.number}"
        return f"{self.source}, {where}" if self.source else where


class Rows(list[Row]):
    """Rows of a data set, with their numbers and places in it. A slice is a plain list without them.

    Attributes:
        numbers: Number of each row in the data set, from 0.
        places: Place of each row.
    """

    def __init__(self, rows: Iterable[Row], places: Sequence[Place], numbers: Iterable[int] | None = None) -> None:
        super().__init__(rows)
        self.places = list(places)
        self.numbers = list(range(len(self)) if numbers is None else numbers)

    @classmethod
    def of(cls, source: str, rows: Iterable[Row]) -> Rows:
        """Return the rows of a source that has no lines."""
        rows = list(rows)
        return cls(rows, [Place(source, "row", number) for number in range(1, len(rows) + 1)])

    def subset(self, indices: Sequence[int]) -> Rows:
        """Return the rows at `indices`, with their numbers and places."""
        return Rows(
            (self[index] for index in indices),
            [self.places[index] for index in indices],
            [self.numbers[index] for index in indices],
        )


def located(rows: Sequence[Row]) -> Rows:
    """Return the rows with numbers and places, those of their positions where they have none."""
    if isinstance(rows, Rows) and len(rows) == len(rows.numbers) == len(rows.places):
        return rows
    return Rows.of("", rows)
