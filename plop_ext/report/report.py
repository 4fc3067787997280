"""A report: what to do with scores, how certain they are, and what the choice costs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from plop_ext.report.against import Against, compare_scores
from plop_ext.report.figures import Drawing, drawings
from plop_ext.report.page import write_page
from plop_ext.report.plots import save_drawings
from plop_ext.report.recommendation import Recommendation, recommend

if TYPE_CHECKING:
    from plop_ext.placement import Placement
    from plop_ext.placement.cost import Cost
    from plop_ext.scores import Scores
    from plop_ext.statistics.summary import Statistics


@dataclass(frozen=True, eq=False)
class Report:
    """What a page, a terminal and a program show of scores.

    Attributes:
        scores: The scores.
        statistics: Their certainty, at the cut of the recommended placement; None for scores without statistics.
        placements: The recommended placement, that of automatic k and all-linear, each once, with its cost, or None if
            it is unknown; empty if the scores cannot be placed.
        recommendation: What to do.
        step: Samples and tokens per sample of the training step whose cost is shown.
        comparison: Comparison with a second score file.
    """

    scores: Scores
    statistics: Statistics | None
    placements: tuple[tuple[Placement, Cost | None], ...]
    recommendation: Recommendation
    step: tuple[int, int]
    comparison: Against | None

    @property
    def chosen(self) -> tuple[str, ...]:
        """The types of the recommended placement; none without a signal."""
        return self.placements[0][0].types if self.placements else ()

    @cached_property
    def drawings(self) -> list[Drawing]:
        """The figures that have something to show."""
        return drawings(self.scores, self.chosen, self.statistics, self.comparison)

    def save_figures(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write each figure as PNG and as SVG into an existing folder; return the files."""
        return save_drawings(self.drawings, folder)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained HTML page, atomically."""
        write_page(
            path,
            self.scores,
            statistics=self.statistics,
            recommendation=self.recommendation,
            drawings=self.drawings,
            placements=self.placements,
            step=self.step,
            comparison=self.comparison,
        )


def make_report(
    scores: Scores,
    path: str,
    *,
    types: int | str | None = None,
    r: int = 16,
    batch: int = 8,
    seq: int = 1024,
    against: Scores | None = None,
) -> Report:
    """Compute a report; takes seconds for a model of tens of thousands of modules.

    Args:
        scores: The scores.
        path: Their file, as the commands that the report recommends name it.
        types: Number of types to recommend (default 3), or `"auto"`.
        r: LoRA rank, to predict costs.
        batch: Samples in a training step, to predict costs.
        seq: Tokens in a sample, to predict costs.
        against: Scores to compare with.

    Raises:
        InputError: If a number is out of range, or if the two scores have no type in common.
    """
    placements = _placements(scores, types, r, (batch, seq))
    chosen = len(placements[0][0].types) if placements else None
    statistics = None if scores.paper_script else scores.statistics(chosen)
    return Report(
        scores=scores,
        statistics=statistics,
        placements=placements,
        recommendation=recommend(scores, placements, statistics, path=path),
        step=(batch, seq),
        comparison=None if against is None else compare_scores(scores, against, chosen or 3),
    )


def _placements(
    scores: Scores, types: int | str | None, r: int, step: tuple[int, int]
) -> tuple[tuple[Placement, Cost | None], ...]:
    from plop_ext.placement.cost import WIDTHS

    if not scores.placeable:
        return ()
    found = [scores.place(types=types, r=r)]
    if not scores.paper_script:
        found.append(scores.place(types="auto", r=r))
    found.append(scores.place(strategy="all", r=r))
    distinct = {placement.modules: placement for placement in reversed(found)}
    dtype = scores.provenance["model"].get("dtype")
    return tuple((item, item.cost(dtype, *step) if dtype in WIDTHS else None) for item in reversed(distinct.values()))
