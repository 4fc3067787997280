"""`run_experiment`: the files of a run, what continues, what is refused, and what a dry run leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plop_ext.cli.main import main
from plop_ext.data import Encoded, encode, load_rows
from plop_ext.errors import InputError
from plop_ext.experiment import trial as trial_module
from plop_ext.experiment.estimate import Estimate
from plop_ext.experiment.result import Comparison
from plop_ext.placement import Placement
from plop_ext.runs.run import run_experiment
from plop_ext.scores import Scores
from tests.support.stub_trials import StubTrials
from tests.support.tiny_lm import byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer()
FILES = ["adapter", "journal.jsonl", "placement.json", "report.html", "result.json", "scores.json"]


@pytest.fixture(scope="module")
def rows() -> tuple[list[Encoded], list[Encoded]]:
    train = encode(load_rows("arithmetic", max_samples=24), TOKENIZER, max_length=96)
    return train, encode(load_rows("arithmetic", split="test", max_samples=6), TOKENIZER, max_length=96)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubTrials]:
    trials = StubTrials({"mlp": 1.5, "attention": 2.5}, seed_spread=0.001, row_spread=0.001)
    monkeypatch.setattr(trial_module, "train_and_measure", trials)
    yield trials


def quick(rows: tuple[list[Encoded], list[Encoded]], folder: Path | None, **options: Any) -> Comparison | None:
    settings: dict[str, Any] = {
        "strategies": ["mlp", "attention"],
        "r": 2,
        "learning_rates": [1e-3],
        "seeds": [3, 4],
        "max_steps": 2,
        "batch_size": 4,
        "widen": 0,
        "progress": False,
    }
    return run_experiment(tiny_llama(num_hidden_layers=1), TOKENIZER, *rows, folder, **(settings | options))


def test_end_to_end_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    small = ["--steps", "1", "--batch-size", "1", "--eval-samples", "4", "--seeds", "2", "--rates", "1e-3"]
    command = ["run", "plop-tiny", "prose", "-o", str(folder), "--device", "cpu", "--max-length", "32", *small]
    assert main([*command, "--finalists", "2", "--rank", "2", "--max-time", "9h"]) == 0
    out, err = capsys.readouterr()
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert "trial 1 of " in err and "time: " in err and "memory: " in err and "disk: " in err
    result = Comparison.load(folder / "result.json")
    assert result.verdict.sentence in " ".join(out.split()) and f"run: {folder}" in out
    assert [row.label for row in result.rows][:2] == ["all-linear", "lowest-3"]
    placement = Placement.load(folder / "placement.json")
    assert placement.label == result.verdict.winner and placement.r == result.row(placement.label).r
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == placement.r and set(placement.types) >= {
        name.rpartition(".")[2] for name in config["target_modules"]
    }
    page = (folder / "report.html").read_text()
    assert "<h2>Not decided" in page or "no claim about others" in page
    assert Scores.load(folder / "scores.json").provenance["data"]["name"] == "prose"


def test_the_winner_is_kept_and_nothing_else(
    rows: tuple[list[Encoded], list[Encoded]], stub: StubTrials, tmp_path: Path
) -> None:
    result = quick(rows, tmp_path / "run")
    assert result is not None and result.verdict.winner == "mlp" and result.verdict.decision == "better"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    assert (tmp_path / "run" / "adapter" / "adapter.txt").read_text() == "mlp 0.001 3"  # of the first seed
    assert Comparison.load(tmp_path / "run" / "result.json") == result and result.adapter == "adapter"


def test_a_finished_run_is_not_touched(
    rows: tuple[list[Encoded], list[Encoded]], stub: StubTrials, tmp_path: Path
) -> None:
    first = quick(rows, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    calls = len(stub.calls)
    assert quick(rows, tmp_path / "run", resume=True) == first
    assert len(stub.calls) == calls
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize("at", ["plop_ext.report.run_page.write_run_page", "plop_ext.runs.run.RunFolder.keep_adapter"])
def test_a_kill_after_the_last_trial_repeats_no_trial(
    rows: tuple[list[Encoded], list[Encoded]],
    stub: StubTrials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    expected = quick(rows, tmp_path / "whole")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(at, killed)
        with pytest.raises(KeyboardInterrupt):
            quick(rows, tmp_path / "run")
    (tmp_path / "run" / ".plop-left").write_text("half a file")
    calls = len(stub.calls)
    assert quick(rows, tmp_path / "run", resume=True) == expected and len(stub.calls) == calls
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES


def test_everything_diverged_leaves_no_adapter(
    rows: tuple[list[Encoded], list[Encoded]], stub: StubTrials, tmp_path: Path
) -> None:
    stub.losses = {label: float("nan") for label in ("all-linear", "mlp", "attention")}
    result = quick(rows, tmp_path / "run")
    assert result is not None and result.verdict.winner is None and result.adapter is None
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "placement.json").exists()


class TestRefusals:
    def test_other_inputs(self, rows: tuple[list[Encoded], list[Encoded]], stub: StubTrials, tmp_path: Path) -> None:
        quick(rows, tmp_path / "run")
        with pytest.raises(InputError, match="is of another run: its settings: max_steps is 2, now it is 3"):
            quick(rows, tmp_path / "run", resume=True, max_steps=3)
        with pytest.raises(InputError, match="is of another run: its training data is"):
            quick((rows[0][1:], rows[1]), tmp_path / "run", resume=True)
        with pytest.raises(InputError, match="holds a finished run; continue it with `resume`"):
            quick(rows, tmp_path / "run")

    def test_a_folder_with_other_files(
        self, rows: tuple[list[Encoded], list[Encoded]], stub: StubTrials, tmp_path: Path
    ) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        for resume in (False, True):
            with pytest.raises(InputError, match="is not empty and holds no run; name a new folder"):
                quick(rows, tmp_path, resume=resume)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"] and not stub.calls

    def test_evaluating_on_the_training_rows(
        self, rows: tuple[list[Encoded], list[Encoded]], stub: StubTrials, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match="`eval`: each of its 24 samples is in the training data too"):
            quick((rows[0], rows[0]), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "`--output` is missing; name a new folder for the run, or give --dry-run"),
            (["-o", "run", "--max-time", "soon"], "`--max-time` must be a time such as 90s, 30m or 2h, got 'soon'"),
            (["-o", "run", "--max-time", "0m"], "`--max-time` must be above 0"),
            (["-o", "run", "--seeds", "0"], "`--seeds` must be at least 1"),
            (["-o", "run", "--margin", "0"], "`--margin` must be above 0"),
            (["-o", "run", "--finalists", "1"], "`--finalists` must be at least 2"),
            (["-o", "run", "--rates", "fast"], "`--rates` must be numbers separated by commas"),
        ],
    )
    def test_options_before_anything_is_loaded(
        self,
        options: list[str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("plop_ext.models.load_model", lambda *_, **__: pytest.fail("loaded a model first"))
        assert main(["run", "plop-tiny", "arithmetic", *options]) == 2
        assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(rows: tuple[list[Encoded], list[Encoded]], stub: StubTrials, tmp_path: Path) -> None:
    seen: list[Estimate] = []
    assert quick(rows, tmp_path / "run", dry_run=True, on_estimate=seen.append) is None
    assert not list(tmp_path.iterdir()) and len(seen) == 1
    text = " ".join(seen[0].lines())
    assert "tuning: 3 trials of 2 steps; final: 3 candidates x 2 seeds of 2 steps" in text and "disk: at most" in text
    assert {call["rate"] for call in stub.calls} == {1e-5}  # only what is timed


def test_a_budget_gives_each_candidate_the_largest_rank_within_it(
    rows: tuple[list[Encoded], list[Encoded]], stub: StubTrials, tmp_path: Path
) -> None:
    result = quick(rows, tmp_path / "run", max_params=2000)
    assert result is not None and result.max_params == 2000
    assert all(1500 < row.params <= 2000 for row in result.rows)
    with pytest.raises(InputError, match="`max_memory` is too small for `all-linear`: rank 1 adds"):
        quick(rows, tmp_path / "other", max_memory=1000)


def test_random_state_of_the_caller_is_left_alone(
    rows: tuple[list[Encoded], list[Encoded]], stub: StubTrials, tmp_path: Path
) -> None:
    import random

    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    quick(rows, tmp_path / "run")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
