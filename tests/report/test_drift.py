"""The figure of NFN over the steps of a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from plop_ext.report.figures import drawings
from plop_ext.report.figures.drawing import Drawing
from plop_ext.report.report import make_report
from plop_ext.scores import Scores
from tests.support.saved_scores import ranked


def trained(*values: float) -> Scores:
    scores = ranked()
    label = scores.types[0]
    records = [{"step": 10 * step, "nfn": {label: value}} for step, value in enumerate(values, start=1)]
    training: dict[str, Any] = {"weight": "W, not W + BA", "drift": records}
    return replace(scores, provenance={**scores.provenance, "training": training})


def figure(scores: Scores) -> Drawing | None:
    return next((drawing for drawing in drawings(scores, scores.types[:1], None) if drawing.name == "drift"), None)


def test_each_record_is_a_point() -> None:
    found = figure(trained(0.5, 0.6, 0.4))
    assert found is not None
    [line] = found.draw(9.0).axes[0].lines
    assert line.get_xdata().tolist() == [10, 20, 30] and line.get_ydata().tolist() == [0.5, 0.6, 0.4]
    assert "from step 10 to step 30" in found.description and "-20.0 %" in found.description
    assert "W, not W + BA" in found.caption


def test_one_record_or_none_is_no_figure() -> None:
    assert figure(trained(0.5)) is None and figure(ranked()) is None


def test_the_page_of_a_training_shows_it(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    trained(0.5, 0.6).save(path)
    page = tmp_path / "page.html"
    make_report(Scores.load(path), str(path)).write(page)
    assert "NFN while training" in page.read_text(encoding="utf-8")
