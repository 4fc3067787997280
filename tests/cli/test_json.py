"""`--json`: the result on stdout, and nothing else there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plop_ext.cli.main import main
from plop_ext.cli.result import Result
from plop_ext.scores import Scores
from tests.support.gain_tables import scores, table

LEVELS = [0.6, 0.8, 0.9, 1.4, 2.0]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    scores(table(LEVELS)).save(tmp_path / "s.json")
    return tmp_path / "s.json"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert isinstance(content, dict)
    return content


def test_place(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "place", saved)
    placement = Scores.load(saved).place()
    assert found["types"] == ["a", "b", "c"] and found["modules"] == list(placement.modules)
    assert found["targets"] == placement.targets() and found["parameters"] == placement.num_parameters()
    assert found["placement"] is None and found["cost"]["total_bytes"] > 0
    output = saved.parent / "p.json"
    assert run(capsys, "place", saved, "-o", output)["placement"] == str(output) and output.is_file()


def test_report(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "report", saved)
    assert found["recommendation"]["headline"].startswith("Put LoRA on a, b and c")
    assert [item["types"] for item in found["placements"]] == [["a", "b", "c"], ["a", "b", "c", "d", "e"]]
    assert [item["type"] for item in found["types"]] == ["a", "b", "c", "d", "e"]


def test_merge(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, output = saved.parent / "t.json", saved.parent / "m.json"
    scores(table(LEVELS, seed=1), data="other").save(other)
    found = run(capsys, "merge", saved, other, "-o", output)
    assert found["scores"] == str(output) and found["provenance"]["data"]["samples"] == 64
    assert len(Scores.load(output).sample_ids) == 64
    assert main(["merge", str(saved), str(saved), "-o", str(saved.parent / "n.json")]) == 2
    assert f"(scores 1: {saved}, 2: {saved})" in capsys.readouterr().err


def test_score_and_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "s.json"
    found = run(capsys, "score", "plop-tiny", "arithmetic", "--samples", 4, "--device", "cpu", "-o", output)
    assert found["scores"] == str(output) and len(found["types"]) == 7
    assert found["statistics"]["k"] == 3 and found["provenance"]["data"]["samples"] == 4
    doctor = run(capsys, "doctor")
    assert doctor["good"] is True and {item["what"] for item in doctor["findings"]} > {"torch", "kernels", "cpu"}


def test_very_quiet_says_only_what_to_do(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(saved), "-qq"]) == 0
    captured = capsys.readouterr()
    assert "Put LoRA on" in captured.out and "│" not in captured.out and captured.err == ""


def test_numbers_that_are_not_finite_are_null() -> None:
    content = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (None, True, "x")}}
    assert json.loads(Result(content).to_json()) == {"a": None, "b": [None, 1.5], "c": {"d": [None, True, "x"]}}
