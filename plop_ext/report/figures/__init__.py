"""The figures of a report."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from plop_ext.report.figures import against, drift, heatmap, intervals, layers, stability
from plop_ext.report.figures.drawing import Drawing

if TYPE_CHECKING:
    from plop_ext.report.against import Against
    from plop_ext.scores import Scores
    from plop_ext.statistics.summary import Statistics

__all__ = ["NAMES", "Drawing", "drawings"]

# Every figure that a report may have.
NAMES = ("heatmap", "intervals", "layers", "stability", "drift", "against")


def drawings(
    scores: Scores, chosen: Collection[str], statistics: Statistics | None, comparison: Against | None = None
) -> list[Drawing]:
    """Return the figures of a report that have something to show.

    Args:
        scores: The scores to draw.
        chosen: Types to mark as chosen for LoRA.
        statistics: The certainty of the ranking at the cut that `chosen` makes; None for scores without statistics.
        comparison: Comparison with a second score file.
    """
    found: list[Drawing | None] = [heatmap.drawing(scores, chosen)]
    if statistics is not None:
        found.append(intervals.drawing(scores, chosen, statistics))
    found.append(layers.drawing(scores, chosen))
    if statistics is not None and statistics.samples > 1:
        found.append(stability.drawing(scores, statistics.k))
    found.append(drift.drawing(scores, chosen))
    if comparison is not None:
        found.append(against.drawing(comparison))
    return [drawing for drawing in found if drawing is not None]
