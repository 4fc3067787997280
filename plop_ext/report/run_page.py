"""The page of an experiment: the verdict first, then what it rests on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plop_ext._version import __version__
from plop_ext.files import write_text_atomic
from plop_ext.report import tables
from plop_ext.report.figures import differences, drawings
from plop_ext.report.svg import inline
from plop_ext.report.templates import render

if TYPE_CHECKING:
    from plop_ext.experiment.result import Comparison
    from plop_ext.scores import Scores

_TEMPLATE = "run.html.j2"


def write_run_page(
    path: str | os.PathLike[str], scores: Scores, comparison: Comparison, chosen: Sequence[str], command: str
) -> None:
    """Write the page.

    Args:
        path: File to write, atomically.
        scores: The scores from which the candidates were made.
        comparison: The experiment.
        chosen: Types of the winner, which figures and tables mark.
        command: Line to run next.
    """
    statistics = scores.statistics(len(chosen) or None)
    found = [differences.drawing(comparison), *drawings(scores, chosen, statistics)]
    shown = [drawing for drawing in found if drawing is not None and drawing.name in ("differences", "heatmap")]
    page = render(
        _TEMPLATE,
        version=__version__,
        name=scores.provenance["model"].get("name") or scores.provenance["model"]["class"],
        data=scores.provenance["data"],
        comparison=comparison,
        verdict=comparison.verdict,
        lines=tables.comparison_lines(comparison),
        rows=tables.ranked_rows(comparison),
        cell=tables.difference_cell,
        figures={drawing.name: (drawing, inline(drawing)) for drawing in shown},
        confidence=tables.confidence_lines(scores, len(chosen) or None),
        by_type=scores.by_type(),
        chosen=set(chosen),
        settings=comparison.settings,
        command=command,
        details=json.dumps({"inputs": comparison.inputs, "schedule": comparison.schedule}, indent=1),
    )
    write_text_atomic(path, page)
