"""No command replaces inputs, other outputs, devices, or files that exist."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from plop_ext.cli.main import build_parser, main
from plop_ext.scores import Scores
from tests.support.disks import limited_file_size
from tests.support.saved_scores import ranked, save_placement, save_scores
from tests.support.stub_trials import StubTrials

SCORE = ["score", "plop-tiny", "{data}", "--quiet", "--device", "cpu"]
COMMANDS = {
    "score": SCORE,
    "place": ["place", "{scores}"],
    "export": ["export", "{placement}", "--to", "trl"],
    "report": ["report", "{scores}", "--against", "{scores}"],
    "merge": ["merge", "{scores}", "{scores}"],
    "compare": ["compare", "plop-tiny", "{data}", "--scores", "{scores}", "--eval", "{other}"],
    "finetune": ["finetune", "plop-tiny", "{data}", "--placement", "{placement}", "--eval", "{other}"],
}
# Options that name a file or folder to write, and what they add to the name.
WRITTEN = {"-o": "", "--heatmap": ".png", "--plot": ".png"}
# Commands whose output is a folder of their own, which has to be new or empty or is theirs alone.
FOLDERS = {"run", "finetune", "demo", "doctor"}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {"data": tmp_path / "data.jsonl", "other": tmp_path / "other.jsonl"}
    found["data"].write_text('{"text": "some words that are long enough to be scored"}\n' * 2)
    found["other"].write_text('{"text": "other words that are long enough to be scored"}\n' * 2)
    return found | {"scores": save_scores(tmp_path), "placement": save_placement(tmp_path)}


@pytest.fixture
def run(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command that has to be refused before a model is loaded, with one line; return it."""
    monkeypatch.setattr("plop_ext.models.load_model", lambda *_, **__: pytest.fail("loaded a model first"))

    def refused(command: list[str], *options: str) -> str:
        before = {path: path.read_bytes() for path in files.values()}
        capsys.readouterr()
        assert main([argument.format(**files) for argument in [*command, *options]]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("plop: ")
        assert {path: path.read_bytes() for path in files.values()} == before
        return lines[0]

    return refused


def subcommands() -> dict[str, argparse.ArgumentParser]:
    return dict(build_parser()[1])


def test_every_command_that_writes_files_is_tried_here_and_has_force() -> None:
    for name, parser in subcommands().items():
        options = {option for action in parser._actions for option in action.option_strings}
        if name not in FOLDERS and options & set(WRITTEN):
            assert name in COMMANDS and "--force" in options


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("way", ["itself", "symlink", "hard link", "by another name"])
def test_no_input_is_replaced(
    name: str, way: str, files: dict[str, Path], run: Callable[..., str], tmp_path: Path
) -> None:
    force = [] if name in FOLDERS else ["--force"]
    for key in {argument[1:-1] for argument in COMMANDS[name] if argument.startswith("{")}:
        output = tmp_path / "alias"
        output.unlink(missing_ok=True)
        if way == "symlink":
            output.symlink_to(files[key])
        elif way == "hard link":
            os.link(files[key], output)
        else:
            output = files[key] if way == "itself" else tmp_path / "sub" / ".." / files[key].name
        assert "would replace" in run(COMMANDS[name], "-o", str(output), *force)


def test_nothing_of_the_model_is_replaced(files: dict[str, Path], run: Callable[..., str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    command = ["score", str(model), "{data}", "--force"]
    assert "would replace MODEL" in run(command, "-o", str(model / "config.json"))
    assert (model / "config.json").read_text() == "{}"


def test_outputs_differ(run: Callable[..., str], tmp_path: Path) -> None:
    same, figures = str(tmp_path / "same.png"), tmp_path / "figures"
    assert "are both" in run(SCORE, "-o", same, "--heatmap", same)
    assert "are both" in run(COMMANDS["report"], "-o", str(figures / "heatmap.svg"), "--figures", str(figures))
    assert "are both" in run(COMMANDS["report"], "-o", str(figures), "--figures", str(figures))
    assert not figures.exists()


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - FOLDERS))
def test_an_existing_file_needs_force(name: str, run: Callable[..., str], tmp_path: Path) -> None:
    options = {option for action in subcommands()[name]._actions for option in action.option_strings}
    for option in options & set(WRITTEN):
        mine = tmp_path / f"mine{WRITTEN[option]}"
        mine.write_text("mine")
        assert f"{mine} exists; add --force" in run(COMMANDS[name], option, str(mine))
        assert mine.read_text() == "mine"


def test_a_figure_that_exists_needs_force(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "layers.svg").write_text("mine")
    assert "layers.svg exists; add --force" in run(COMMANDS["report"], "--figures", str(tmp_path))
    assert (tmp_path / "layers.svg").read_text() == "mine"


def test_force_replaces_an_earlier_output(files: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "p.json"
    output.write_text("old")
    assert main(["place", str(files["scores"]), "-o", str(output), "--force"]) == 0
    assert json.loads(output.read_text())["format"] == "plop_ext.placement"


def test_devices_stay(files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    null = tmp_path / "null"
    null.symlink_to(os.devnull)
    score = [argument.format(**files) for argument in SCORE]
    assert main([*score, "-o", str(null)]) == 0
    assert null.is_char_device() and Path(os.devnull).is_char_device()
    assert not [path for path in Path("/dev").iterdir() if "partial" in path.name]


@pytest.mark.parametrize(("name", "option"), [("score", "-o"), ("place", "-o"), ("report", "-o"), ("merge", "-o")])
def test_standard_output_holds_the_output_alone(
    name: str, option: str, files: dict[str, Path], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if name == "merge":
        ranked().save(files["other"], overwrite=True)
        content = json.loads(files["other"].read_text())
        content["provenance"]["data"]["name"] = "another"
        files["other"].write_text(json.dumps(content))
    command = ["merge", "{scores}", "{other}"] if name == "merge" else COMMANDS[name]
    arguments = [argument.format(**files) for argument in command if argument not in ("--against", "--quiet")]
    if name == "report":
        arguments = ["report", str(files["scores"])]
    capfd.readouterr()
    assert main([*arguments, option, "/dev/stdout"]) == 0
    printed = capfd.readouterr().out
    if name == "report":
        assert printed.startswith("<!doctype html>") and printed.rstrip().endswith("</html>")
    else:
        assert json.loads(printed)["format"] in ("plop_ext.scores", "plop_ext.placement")
    assert main([*arguments, option, "/dev/stdout", "--json"]) == 2
    out, err = capfd.readouterr()
    assert not out and "would both write to standard output; leave one out" in err


@pytest.mark.parametrize("name", ["place", "report"])
def test_a_full_disk_is_one_line_and_names_where_the_result_is(
    name: str,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([name, str(files["scores"]), "-o", "/dev/full"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot write `/dev/full`: No space left on device" in line
    (spare,) = tmp_path.glob("plop-rescued-*/full")
    assert f"saved as `{spare}` instead" in line


def test_a_disk_that_fills_up_while_scoring_is_one_line(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "s.json"
    score = [argument.format(**files) for argument in SCORE]
    with limited_file_size(2000):
        assert main([*score, "-o", str(output)]) == 2
    assert "free some space" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not output.exists()


def test_resume_leaves_a_finished_output_of_the_same_inputs(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "s.json"
    score = [argument.format(**files) for argument in SCORE]
    assert main([*score, "-o", str(output)]) == 0
    before = output.read_bytes()
    assert main([*score, "-o", str(output)]) == 2
    with monkeypatch.context() as patch:
        patch.setattr("plop_ext.models.load_model", lambda *_, **__: pytest.fail("scored again"))
        capsys.readouterr()
        assert main([*score, "-o", str(output), "--resume", "--heatmap", str(tmp_path / "h.png")]) == 0
        out, err = capsys.readouterr()
        assert "is finished and of the same inputs; nothing to do" in err and "q_proj" in out
        assert (tmp_path / "h.png").is_file()
        assert main([*score, "-o", str(output), "--resume", "--max-length", "8"]) == 2
        assert "from other inputs" in capsys.readouterr().err
        files["data"].write_text('{"text": "words that were changed since, but not in their number"}\n')
        assert main([*score, "-o", str(output), "--resume"]) == 2
    assert output.read_bytes() == before
    assert main([*score, "-o", str(output), "--resume", "--force"]) == 0
    assert output.read_bytes() != before and len(Scores.load(output).sample_ids) == 1


def test_resume_leaves_a_finished_comparison_of_the_same_inputs(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files["data"].write_text("".join(f'{{"text": "row {i} of words that are long enough"}}\n' for i in range(30)))
    assert main(["score", "plop-tiny", str(files["data"]), "--samples", "4", "-o", str(tmp_path / "scored.json")]) == 0
    output = tmp_path / "c.json"
    command = ["compare", "plop-tiny", str(files["data"]), "--scores", str(tmp_path / "scored.json")]
    command += ["--device", "cpu", "--steps", "1", "--seeds", "2", "--rates", "1e-3", "-o", str(output)]
    monkeypatch.setattr("plop_ext.experiment.trial.train_and_measure", StubTrials())
    assert main(command) == 0
    assert "time: " in capsys.readouterr().err
    before = output.read_bytes()
    assert main(command) == 2
    with monkeypatch.context() as patch:
        patch.setattr("plop_ext.models.load_model", lambda *_, **__: pytest.fail("compared again"))
        capsys.readouterr()
        assert main([*command, "--resume", "--plot", str(tmp_path / "c.png")]) == 0
        out, err = capsys.readouterr()
        assert "is finished and of the same inputs; nothing to do" in err and "all-linear" in out
        assert (tmp_path / "c.png").is_file()
        for change in (["--steps", "2"], ["--margin", "0.02"], ["--scores", str(files["scores"])]):
            assert main([*command, "--resume", *change]) == 2
            assert "from other inputs" in capsys.readouterr().err
    assert output.read_bytes() == before and not (tmp_path / "c.json.partial").exists()
    assert main([*command, "--resume", "--force", "--steps", "2"]) == 0
    assert output.read_bytes() != before
