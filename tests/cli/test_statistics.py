"""`plop score` and `plop place` on early stop, automatic k, ranks and budgets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plop_ext.cli.main import main
from plop_ext.placement import Placement
from plop_ext.scores import Scores
from tests.support.gain_tables import scores, table

SCORE = ["score", "plop-tiny", "arithmetic", "--quiet", "--device", "cpu"]


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = tmp_path / "s.json"
    scores(table([0.5, 0.5, 1.2, 1.2, 2.0], own_layer_sd=0.05)).save(path)
    return str(path)


def stop_of(path: Path) -> dict[str, object] | None:
    return Scores.load(path).provenance["stop"]


def test_score_stops_by_itself_and_says_how_much_it_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "s.json"
    assert main([*SCORE, "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "settled after 8 samples: 8 of 128 samples scored, the 3 lowest types are the same in" in printed
    assert "tied across the cut after 3 types: gate_proj and down_proj" in printed and "automatic k is 2" in printed
    found = stop_of(output)
    assert found is not None and found["settled"] and found["available"] == 128
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json"]


@pytest.mark.parametrize(
    ("options", "samples", "watched"),
    [
        (["--samples", "20"], 20, None),
        (["--samples", "20", "--stop", "settled", "--batch-size", "4"], 4, (3, None)),
        (["--samples", "12", "--stop", "settled", "--settle-types", "7"], 8, (7, None)),
        (["--samples", "68", "--stop", "settled", "--settle-modules", "14", "--batch-size", "32"], 64, (None, 14)),
    ],
)
def test_score_options(
    options: list[str], samples: int, watched: tuple[int | None, int | None] | None, tmp_path: Path
) -> None:
    output = tmp_path / "s.json"
    assert main([*SCORE, *options, "-o", str(output)]) == 0
    assert len(Scores.load(output).sample_ids) == samples
    found = stop_of(output)
    assert (None if found is None else (found["types"], found["modules"])) == watched


def test_score_marks_as_many_types_as_it_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SCORE, "--settle-types", "5"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert len(table) == 7 and sum("yes" in line for line in table) == 5


def test_samples_are_identified_by_row_and_split(tmp_path: Path) -> None:
    found = {}
    for split in ("train", "test"):
        output = tmp_path / f"{split}.json"
        assert main([*SCORE, "--samples", "8", "--split", split, "-o", str(output)]) == 0
        found[split] = Scores.load(output)
        assert found[split].sample_ids.max() > 8
    assert (
        found["train"].sample_data == ("arithmetic",) * 8 and found["test"].sample_data == ("arithmetic (test)",) * 8
    )
    assert Scores.merge([found["train"], found["test"]]).provenance["data"]["samples"] == 16


def test_a_streamed_run_leaves_the_journal_of_another_alone(tmp_path: Path) -> None:
    left = tmp_path / "s.json.partial"
    left.write_text("of a killed run")
    assert main([*SCORE, "--stream", "--samples", "2", "-o", str(tmp_path / "s.json")]) == 0
    assert left.read_text() == "of a killed run" and (tmp_path / "s.json").is_file()


def test_place_automatic_k_says_why(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "p.json"
    assert main(["place", saved, "--types", "auto", "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("automatic k is ") and "training adds" in printed
    placement = Placement.load(output)
    assert placement.label == "lowest-2" and placement.reason in printed


def test_place_within_budgets(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "p.json"
    assert main(["place", saved, "--max-params", "0.2", "-o", str(output)]) == 0
    assert Placement.load(output).num_parameters() <= 200_000
    budget = ["--max-memory", "40MiB", "--batch-size", "1", "--seq", "128", "--ranks", "inverse-nfn"]
    assert main(["place", saved, *budget, "-o", str(output), "--force"]) == 0
    placement = Placement.load(output)
    assert placement.cost("float32", 1, 128).total_bytes <= 40 * 2**20 and placement.ranks
    assert "trainable parameters at ranks" in capsys.readouterr().out
    assert main(["place", saved, "--rank", "4"]) == 0
    assert "at r=4" in capsys.readouterr().err


def test_finetune_takes_the_ranks_of_the_placement(tmp_path: Path) -> None:
    source, placed, adapter = tmp_path / "s.json", tmp_path / "p.json", tmp_path / "adapter"
    assert main([*SCORE, "-o", str(source)]) == 0
    assert main(["place", str(source), "--rank", "4", "--ranks", "inverse-nfn", "-o", str(placed)]) == 0
    budget = ["--steps", "2", "--batch-size", "2", "--eval-samples", "4", "--quiet", "--device", "cpu"]
    command = ["finetune", "plop-tiny", "arithmetic", "--placement", str(placed), "-o", str(adapter), *budget]
    assert main(command) == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    placement = Placement.load(placed)
    assert config["r"] == placement.r and config["lora_alpha"] == 2 * placement.r
    assert set(config["rank_pattern"].values()) == set(placement.ranks.values()) - {placement.r}
    assert {key: 2 * rank for key, rank in config["rank_pattern"].items()} == config["alpha_pattern"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SCORE, "--stop", "soon"], "--stop: invalid choice: 'soon'"),
        ([*SCORE, "--settle-types", "0"], "`--settle-types` must be at least 1"),
        ([*SCORE, "--settle-types", "2", "--settle-modules", "5"], "exclude each other; give one"),
        ([*SCORE, "--settle-types", "2", "--stream"], "early stop, and this run has none; leave --settle-types out"),
        ([*SCORE, "--settle-modules", "9", "--stream", "--dry-run"], "`--settle-modules` configures the early stop"),
        (
            [*SCORE, "--settle-modules", "9", "--samples", "8"],
            "this run has none; add --stop settled, or leave --settle-",
        ),
        ([*SCORE, "--stop", "settled", "--compat", "paper-script"], "`--stop` has no meaning with `--compat`"),
        (["place", "{saved}", "--max-params", "much"], "`--max-params` must be a number"),
        (["place", "{saved}", "--max-memory", "xGiB"], "`--max-memory` must be a size"),
        (["place", "{saved}", "--max-params", "5"], "nothing fits 5 parameters"),
        (["place", "{saved}", "--ranks", "equal"], "--ranks: invalid choice: 'equal'"),
        (["place", "{saved}", "--rank", "0"], "`--rank` must be at least 1"),
    ],
)
def test_mistakes(arguments: list[str], message: str, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument.format(saved=saved) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
