"""The rows of a page's table of modules, few enough to read and to load."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plop_ext.score_data.modules import ScoredModule
    from plop_ext.scores import Scores

# 50,000 rows would be a page of 10 MB, which no one reads.
MOST_ROWS = 1500


@dataclass(frozen=True)
class ModuleRow:
    """A module, or the modules of one type in one layer.

    Attributes:
        name: Name of the module, or type and layer.
        modules: Number of modules.
        nfn: Mean NFN.
        lowest: Lowest NFN.
        highest: Highest NFN.
        shape: `in_features` and `out_features`, or None where the modules differ.
        chosen: Whether the type is chosen for LoRA.
    """

    name: str
    modules: int
    nfn: float
    lowest: float
    highest: float
    shape: tuple[int, int] | None
    chosen: bool


def module_rows(scores: Scores, chosen: Collection[str]) -> tuple[str, list[ModuleRow]]:
    """Return what the rows are, and the rows, lowest NFN first.

    A model of up to `MOST_ROWS` modules has a row per module, a larger one a row per type and layer. Of these, only
    the lowest `MOST_ROWS` are listed.
    """
    pairs = list(zip(scores.modules, scores.nfn.tolist(), strict=True))
    if len(pairs) <= MOST_ROWS:
        rows = [_row(module.name, [(module, value)], chosen) for module, value in pairs]
        return f"All {len(rows):,} modules", _sorted(rows)

    def place(pair: tuple[ScoredModule, float]) -> tuple[str, int]:
        return pair[0].type, -1 if pair[0].layer is None else pair[0].layer

    rows = [
        _row(label if layer < 0 else f"{label}, layer {layer}", list(members), chosen)
        for (label, layer), members in groupby(sorted(pairs, key=place), key=place)
    ]
    what = f"All {len(pairs):,} modules by type and layer"
    if len(rows) > MOST_ROWS:
        what = f"The {MOST_ROWS:,} lowest of {len(rows):,} rows: all {len(pairs):,} modules by type and layer"
    return what, _sorted(rows)[:MOST_ROWS]


def _row(name: str, members: list[tuple[ScoredModule, float]], chosen: Collection[str]) -> ModuleRow:
    values = [value for _, value in members]
    shapes = {(module.in_features, module.out_features) for module, _ in members}
    return ModuleRow(
        name=name,
        modules=len(values),
        nfn=sum(values) / len(values),
        lowest=min(values),
        highest=max(values),
        shape=shapes.pop() if len(shapes) == 1 else None,
        chosen=members[0][0].type in chosen,
    )


def _sorted(rows: list[ModuleRow]) -> list[ModuleRow]:
    return sorted(rows, key=lambda row: row.nfn)
