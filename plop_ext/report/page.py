"""One self-contained page: everything inline, no network, light or dark by the reader's colour scheme."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plop_ext._version import __version__
from plop_ext.files import write_text_atomic
from plop_ext.report import tables
from plop_ext.report.against import Against
from plop_ext.report.figures import Drawing
from plop_ext.report.module_rows import module_rows
from plop_ext.report.recommendation import Recommendation
from plop_ext.report.svg import inline
from plop_ext.report.templates import render

if TYPE_CHECKING:
    from plop_ext.placement import Placement
    from plop_ext.placement.cost import Cost
    from plop_ext.scores import Scores
    from plop_ext.statistics.summary import Statistics

_TEMPLATE = "page.html.j2"
_MOST_TYPES = 500


def write_page(
    path: str | os.PathLike[str],
    scores: Scores,
    *,
    statistics: Statistics | None,
    recommendation: Recommendation,
    drawings: Sequence[Drawing],
    placements: Sequence[tuple[Placement, Cost | None]],
    step: tuple[int, int],
    comparison: Against | None = None,
) -> None:
    """Write the page.

    Args:
        path: File to write, atomically.
        scores: The scores to report.
        statistics: The certainty of the ranking; None for scores without statistics.
        recommendation: What to do, shown first.
        drawings: The figures, in the order of `plop_ext.report.figures.drawings`.
        placements: Placements with their cost, or None if it is unknown; figures and tables mark the first.
        step: Samples and tokens per sample of the training step whose cost is shown.
        comparison: Comparison with a second score file.
    """
    chosen = set(placements[0][0].types) if placements else set[str]()
    what, rows = module_rows(scores, chosen)
    figures = {drawing.name: (drawing, inline(drawing)) for drawing in drawings}
    page = render(
        _TEMPLATE,
        version=__version__,
        name=scores.provenance["model"].get("name") or scores.provenance["model"]["class"],
        data=scores.provenance["data"],
        provenance=scores.provenance,
        details=json.dumps(dict(scores.provenance), indent=1),
        tokens=scores.tokens,
        recommendation=recommendation,
        lines=tables.confidence_lines(scores, len(chosen) or None),
        statistics=statistics,
        by_name={} if statistics is None else {item.type: item for item in statistics.types},
        by_type=scores.by_type()[:_MOST_TYPES],
        no_place=scores.no_place_by_type(),
        more_types=max(0, len(scores.types) - _MOST_TYPES),
        what_rows=what,
        rows=rows,
        chosen=chosen,
        heatmap=figures.pop("heatmap"),
        against=figures.pop("against", None),
        figures=list(figures.values()),
        placements=placements,
        step=step,
        left_out=tables.left_out_lines(scores),
        comparison=comparison,
        comparison_lines=[] if comparison is None else tables.against_lines(comparison),
    )
    write_text_atomic(path, page)
