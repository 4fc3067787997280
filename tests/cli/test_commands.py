"""The `plop` command on the embedded model: the whole path, and one mistake of each kind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from plop_ext import demo_assets
from plop_ext.cli.main import main
from plop_ext.placement import Placement
from plop_ext.scores import Scores

FINETUNE = ["finetune", "plop-tiny", "arithmetic", "--placement", "{placement}"]


@pytest.fixture(scope="module")
def scores_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "scores.json"
    assert main(["score", "plop-tiny", "arithmetic", "--quiet", "--device", "cpu", "-o", str(path)]) == 0
    return path


@pytest.fixture
def placement_file(scores_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "placement.json"
    assert main(["place", str(scores_file), "-o", str(path)]) == 0
    return path


def test_score_writes_table_scores_and_heatmap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, heatmap = tmp_path / "s.json", tmp_path / "h.png"
    arguments = ["score", "plop-tiny", "arithmetic", "--quiet", "--device", "cpu", "--mask", "completion"]
    assert main([*arguments, "--samples", "16", "-o", str(output), "--heatmap", str(heatmap)]) == 0
    scores = Scores.load(output)
    printed = capsys.readouterr().out
    for label in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert label in scores.types and label in printed
    assert scores.provenance["settings"]["mask"] == "completion"
    data = scores.provenance["data"]
    assert (data["name"], data["samples"], data["split"], data["columns"]) == ("arithmetic", 16, "train", None)
    assert (data["max_length"], data["batch_size"]) == (1024, 8) and len(data["hash"]) == 32
    assert scores.provenance["model"]["name"] == "plop-tiny"
    assert heatmap.read_bytes().startswith(b"\x89PNG")


def test_place_prints_peft_targets_or_writes_a_placement(
    scores_file: Path, placement_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["place", str(scores_file)]) == 0
    printed = capsys.readouterr()
    targets = json.loads(printed.out)
    assert "trainable parameters" in printed.err
    assert tuple(targets["target_modules"]) == Placement.load(placement_file).modules
    assert Placement.load(placement_file).types == Scores.load(scores_file).types[:3]


def test_finetune_lowers_the_held_out_loss_and_writes_an_adapter(
    placement_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    budget = ["--steps", "8", "--batch-size", "4", "--eval-samples", "16", "--quiet", "--device", "cpu"]
    arguments = ["finetune", "plop-tiny", "arithmetic", "--placement", str(placement_file), "-o", str(adapter)]
    assert main([*arguments, *budget, "--lr", "3e-3"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("held-out loss"))
    before, after = (float(word) for word in line.split() if word[0].isdigit())
    assert after < before
    assert (adapter / "adapter_model.safetensors").is_file()
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "plop-tiny"


@pytest.mark.slow
def test_compare_prints_plots_and_saves(scores_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plot = tmp_path / "c.json", tmp_path / "c.png"
    budget = ["--steps", "2", "--batch-size", "2", "--eval-samples", "4", "--seeds", "2", "--rates", "1e-3,4e-3"]
    arguments = ["compare", "plop-tiny", "arithmetic", "--scores", str(scores_file), "--device", "cpu", "--quiet"]
    files = ["-o", str(output), "--plot", str(plot)]
    assert main([*arguments, *budget, *files, "--strategies", "lowest,random:1"]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["label"] for row in rows] == ["all-linear", "lowest-3", "random-3 (seed 1)"]
    assert "all-linear" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_demo_ends_with_a_verdict_and_the_line_for_your_own_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "demo"
    assert main(["demo", "-o", str(folder), "--steps", "2", "--quiet"]) == 0
    assert {"report.html", "result.json", "adapter"} < {path.name for path in folder.iterdir()}
    printed = capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["verdict"]["sentence"] in " ".join(printed.split())
    assert printed.splitlines()[-1] == "  plop run MODEL DATA -o FOLDER --max-time 2h"
    assert main(["demo", "-o", str(folder), "--steps", "2", "--quiet", "--resume"]) == 0
    assert main(["demo", "-o", str(folder), "--steps", "2", "--quiet"]) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_prompts_that_are_cut_off_are_scored_but_not_trained_on(
    placement_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "d.jsonl", tmp_path / "s.json"
    row = {"prompt": "What is 12 + 30? It is, as anyone who adds can tell, ", "completion": "42"}
    data.write_text("\n".join([json.dumps(row)] * 4))
    common = ["--max-length", "24", "--quiet", "--device", "cpu"]
    assert main(["score", "plop-tiny", str(data), *common, "-o", str(output)]) == 0
    assert Scores.load(output).provenance["data"]["samples"] == 4
    assert main(["score", "plop-tiny", str(data), *common, "--mask", "completion"]) == 2
    capsys.readouterr()
    assert main(["finetune", "plop-tiny", str(data), "--placement", str(placement_file), *common]) == 2
    assert "d.jsonl` has no token to predict in 4 samples" in capsys.readouterr().err


def test_a_model_of_two_types_is_scored_and_placed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "s.json"
    only = ["--include", "q_proj", "--include", "v_proj", "--quiet", "--device", "cpu"]
    assert main(["score", "plop-tiny", "arithmetic", *only, "-o", str(output)]) == 0
    capsys.readouterr()
    assert main(["place", str(output)]) == 0
    assert len(json.loads(capsys.readouterr().out)["target_modules"]) == 2 * 8


def test_an_adapter_that_is_not_kept_is_said_so(placement_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["--steps", "1", "--batch-size", "1", "--eval-samples", "1", "--device", "cpu"]
    assert main([argument.format(placement=placement_file) for argument in FINETUNE] + budget) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "no adapter written; give -o FOLDER to keep it"
    assert "loading plop-tiny ..." in printed.err and "reading arithmetic ..." in printed.err


def test_doctor_names_the_backend(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    printed = capsys.readouterr().out
    assert "native-cpu, checked" in printed


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (["score"], ["-o", "."], "is a folder"),
        (["score"], ["--heatmap", "h.bmp"], "cannot draw a .bmp"),
        (["score"], ["--heatmap", "h"], "cannot draw a file without extension"),
        (["score"], ["--heatmap", "no/such/folder/h.png"], "writable folder that exists"),
        (["compare", "--scores", "{scores}"], ["-o", "."], "is a folder"),
        (["compare", "--scores", "{scores}"], ["--plot", "c.bmp"], "cannot draw a .bmp"),
        (["finetune", "--placement", "{placement}"], ["-o", "{used}"], "is not empty"),
        (["finetune", "--placement", "{placement}"], ["-o", "{scores}"], "is a file"),
    ],
)
def test_a_bad_output_is_noticed_before_the_model_is_loaded(
    command: list[str],
    options: list[str],
    message: str,
    scores_file: Path,
    placement_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("plop_ext.models.load_model", lambda *_, **__: pytest.fail("loaded a model first"))
    files = {"scores": scores_file, "placement": placement_file, "used": scores_file.parent}
    arguments = [command[0], "plop-tiny", "arithmetic", *command[1:], *options]
    assert main([argument.format(**files) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_scores_are_saved_before_they_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plop_ext.report.plots.heatmap", no_space)
    scores = tmp_path / "s.json"
    arguments = ["score", "plop-tiny", "arithmetic", "--quiet", "--device", "cpu", "--samples", "8", "-o", str(scores)]
    assert main([*arguments, "--heatmap", str(tmp_path / "h.png")]) == 2
    Scores.load(scores)


@pytest.mark.slow
def test_comparisons_are_saved_before_they_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores_file: Path
) -> None:
    monkeypatch.setattr("plop_ext.report.plots.comparison_plot", no_space)
    comparison, common = tmp_path / "c.json", ["--quiet", "--device", "cpu"]
    budget = ["--steps", "1", "--batch-size", "1", "--eval-samples", "2", "--seeds", "1", "--rates", "1e-3"]
    arguments = ["compare", "plop-tiny", "arithmetic", "--scores", str(scores_file), *common, *budget]
    assert main([*arguments, "-o", str(comparison), "--plot", str(tmp_path / "c.png")]) == 2
    assert comparison.is_file()


def _truncated_checkpoint(folder: Path) -> Path:
    shutil.copytree(demo_assets.model_path(), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "plop-tiny", "arithmetic", "--columns", "nope"], "nope"),
        (["score", "plop-tiny", "missing.jsonl"], "`DATA` 'missing.jsonl': no such file"),
        (["score", "plop-tiny", "{empty}"], "holds no row"),
        (["score", "no-such-folder/", "arithmetic"], "`MODEL` 'no-such-folder/'"),
        (["score", "{corrupt}", "arithmetic"], "corrupt"),
        (["score", "plop-tiny", "arithmetic", "--include", "nope"], "`nope` in `--include`/`--exclude` matches no"),
        (["score", "plop-tiny", "prose", "--mask", "completion"], "completion"),
        (["score", "plop-tiny", "arithmetic", "--mask", "none"], "--mask: invalid choice: 'none'"),
        (["score", "plop-tiny", "arithmetic", "--baseline", "none"], "--baseline: invalid choice: 'none'"),
        (["score", "plop-tiny", "arithmetic", "--token-step", "0"], "`--token-step` must be at least 1"),
        (
            ["score", "plop-tiny", "arithmetic", "--token-step", "100000"],
            "`--token-step`=100000 reads one token in 100000",
        ),
        (
            ["score", "plop-tiny", "arithmetic", "--pad-to-multiple-of", "0"],
            "`--pad-to-multiple-of` must be at least 1",
        ),
        (["score", "plop-tiny", "arithmetic", "--stream", "--graph"], "`--graph` replays whole forwards"),
        (["score", "plop-tiny", "arithmetic", "--samples", "-1"], "`--samples` must be at least 1, got -1"),
        (["score", "plop-tiny", "{chats}", "--columns", "nope"], "`--columns` 'nope' does not exist"),
        (["score", "plop-tiny", "{chats}"], "`DATA` have none of `input_ids`"),
        (["score", "plop-tiny", "arithmetic", "-o", "no/such/folder/s.json"], "writable folder that exists"),
        (["place", "missing.json"], "cannot read"),
        (["place", "{scores}", "--types", "8"], "`--types` must be between 1 and 7"),
        (["place", "{scores}", "--types", "nope"], "there is no type `nope`"),
        (["place", "{scores}", "--modules", "x"], "`--modules` must be a number"),
        (["place", "{scores}", "--types", "2", "--max-nfn", "1"], "exclude each other"),
        (["place", "{old}"], "has version 0"),
        (["finetune", "plop-tiny", "arithmetic", "--placement", "{scores}"], "is not a plop_ext.placement file"),
        (["finetune", "plop-tiny", "arithmetic", "--placement", "{other}"], "made for another model"),
        (["compare", "plop-tiny", "arithmetic", "--scores", "{scores}", "--rates", "fast"], "`--rates` must be"),
        (["compare", "plop-tiny", "arithmetic", "--scores", "{scores}", "--rates", "-1"], "`--rates` must be above 0"),
        (["compare", "plop-tiny", "arithmetic", "--scores", "{scores}", "--rank", "0"], "`--rank` must be at least 1"),
        (["compare", "plop-tiny", "arithmetic", "--scores", "{scores}", "--seeds", "0"], "`--seeds` must be at least"),
        (
            ["compare", "plop-tiny", "arithmetic", "--scores", "{scores}", "--strategies", "best"],
            "`--strategies` must be one of",
        ),
        ([*FINETUNE, "--eval", "missing.jsonl"], "`--eval` 'missing.jsonl': no such file"),
        ([*FINETUNE, "--eval", "{chats}"], "`--eval` have none of `input_ids`"),
        ([*FINETUNE, "--rank", "0"], "`--rank` must be at least 1, got 0"),
        ([*FINETUNE, "--seed", "-1"], "`--seed` must be at least 0, got -1"),
        ([*FINETUNE, "--eval-samples", "-2"], "`--eval-samples` must be at least 1, got -2"),
        ([*FINETUNE, "--alpha", "0"], "`--alpha` must be above 0, got 0"),
        ([*FINETUNE, "--lr", "0"], "`--lr` must be above 0, got 0.0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    scores_file: Path,
    placement_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("old", "other")}
    files |= {"empty": tmp_path / "empty.jsonl", "corrupt": tmp_path / "corrupt", "scores": scores_file}
    files |= {"chats": tmp_path / "chats.jsonl", "placement": placement_file}
    files["empty"].write_text("")
    files["chats"].write_text('{"question": "x"}')
    files["old"].write_text(json.dumps({**json.loads(scores_file.read_text()), "version": 0}))
    files["other"].write_text(placement_file.read_text().replace("layers.0.", "layers.90."))
    if "{corrupt}" in arguments:
        _truncated_checkpoint(files["corrupt"])
    existing = sorted(tmp_path.rglob("*"))
    capsys.readouterr()

    device = [] if arguments[0] == "place" else ["--quiet", "--device", "cpu"]
    assert main([*(argument.format(**files) for argument in arguments), *device]) == 2

    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("plop: ") and message in lines[0]
    assert sorted(tmp_path.rglob("*")) == existing


def test_columns_are_mapped_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "2+2=", "answer": "4", "note": "a text of some words"}\n' * 2)
    score = ["score", "plop-tiny", str(path), "--device", "cpu", "--samples", "2"]
    for columns, said in (
        (
            "prompt=question,completion=answer",
            "reading 2 rows as prompts and completions",
        ),
        ("note", "reading 2 rows as plain text (`text`)"),
    ):
        assert main([*score, "--columns", columns]) == 0
        assert said in caplog.text
    assert main([*score, "--columns", "prompt=question"]) == 2
    assert "`DATA` have none of" in capsys.readouterr().err


def test_names_that_look_like_markup_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "x["
    folder.mkdir()
    data, output = "x[/b]:smile:.jsonl", "x[/red].json"
    (tmp_path / data).write_text('{"text": "some words that are long enough to be scored"}\n' * 2)
    assert main(["score", "plop-tiny", data, "--device", "cpu", "--samples", "2", "-o", output]) == 0
    printed = capsys.readouterr()
    assert f"on {data}" in printed.out and f"scores: {output};" in printed.out and f"reading {data} ..." in printed.err
    assert main(["report", output, "-o", "x[/b].html"]) == 0
    assert "report: x[/b].html" in capsys.readouterr().out
