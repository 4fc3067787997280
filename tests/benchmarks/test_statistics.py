"""The benchmarks of early stop and time to placement run, and the page shows the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import early_stop, time_to_placement, to_markdown
from tests.support.paths import ROOT


@pytest.mark.parametrize("benchmark", [early_stop, time_to_placement], ids=["early_stop", "time_to_placement"])
def test_quick_run_writes_a_result_that_renders(benchmark: object, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    benchmark.main(["--quick", "--device", "cpu", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["quick"] and result["rows"]
    rendered = to_markdown.render(result)
    assert "quick run, figures mean nothing" in rendered and rendered.count("\n|") > len(result["rows"])


def test_committed_early_stop_result_holds_what_is_claimed() -> None:
    """The same placement as all 512 samples in at least 19 of 20 seeds, with at most a tenth of them."""
    result = json.loads((ROOT / "benchmarks" / "results" / "early_stop.json").read_text())
    assert not result["quick"] and result["settings"]["samples"] == 512
    rows = [row for row in result["rows"] if row["watched"] == "3 types"]
    assert {row["batch"] for row in rows} == {1, 4, 8}
    assert all(row["seeds"] == 20 and row["same"] >= 19 and row["samples_max"] <= 51 for row in rows)


def test_the_page_shows_the_committed_results() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    to_markdown.main([*map(str, results), "--check", str(ROOT / "docs" / "statistics.md")])
