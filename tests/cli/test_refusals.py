"""The `plop` command refuses files that belong to something else, with one line and exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from plop_ext import demo_assets
from plop_ext.cli.main import main
from tests.support.saved_scores import save_placement, save_scores


@pytest.fixture(scope="module")
def scores_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "scores.json"
    arguments = ["score", "plop-tiny", "arithmetic", "--samples", "8", "--quiet", "--device", "cpu"]
    assert main([*arguments, "-o", str(path)]) == 0
    return path


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("plop: ")
    return lines[0]


@pytest.mark.parametrize("value", ["NaN", "0", "null", '"1"'])
def test_damaged_scores(value: str, scores_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(scores_file.read_text())
    content["modules"][0]["baseline"] = json.loads(value)
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(content))
    assert "is a damaged scores file" in refusal(["place", str(damaged), "--types", "3"], capsys)


def random_copy(folder: Path) -> Path:
    """The embedded model with weights that were never trained."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(demo_assets.model_path(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return folder


def test_scores_of_another_model(scores_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    placement, model = str(tmp_path / "placement.json"), str(random_copy(tmp_path / "model"))
    assert main(["place", str(scores_file), "--types", "3", "-o", placement]) == 0
    settings = ["--quiet", "--device", "cpu", "--eval-samples", "4", "--steps", "1"]
    for arguments in (
        ["finetune", model, "arithmetic", "--placement", placement, "-o", str(tmp_path / "adapter")],
        ["compare", model, "arithmetic", "--scores", str(scores_file)],
    ):
        assert "was made for other weights" in refusal([*arguments, *settings], capsys)
    assert not (tmp_path / "adapter").exists()


def test_every_token_masked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "x" * 64, "completion": "y"}) + "\n")
    arguments = ["score", "plop-tiny", str(data), "--quiet", "--device", "cpu"]
    assert "token" in refusal([*arguments, "--mask", "completion", "--max-length", "32"], capsys)
    skipped = refusal([*arguments, "--token-step", "100000"], capsys)
    assert "no token counts" in skipped and "reads one token in 100000" in skipped


@pytest.mark.parametrize(
    "option",
    [["--samples", "9" * 20], ["--probes", "9" * 12], ["--pad-to-multiple-of", "0"], ["--pad-to-multiple-of", "5000"]],
    ids=str,
)
def test_numbers_out_of_range_are_refused_before_the_model_is_loaded(
    option: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plop_ext.models.load_model", lambda *_, **__: pytest.fail("loaded"))
    assert option[0] in refusal(["score", "plop-tiny", "arithmetic", *option], capsys)


@pytest.mark.parametrize(
    ("command", "match"),
    [
        (["score", "MODEL", "absent.jsonl"], "`DATA` 'absent.jsonl': no such file; check the path"),
        (["score", "MODEL", "-"], "standard input is not read; save it to a file"),
        (["score", "MODEL", "*.jsonl"], "no such file; give several files as a folder"),
        (
            ["score", "MODEL", "a.jsonl", "b.jsonl"],
            "`--output` is missing; name a folder for the scores of several DATA",
        ),
        (["finetune", "MODEL", "absent.jsonl", "--placement", "{placement}"], "no such file"),
        (
            ["finetune", "MODEL", "prose", "--placement", "{placement}", "--eval", "absent.csv"],
            "`--eval` 'absent.csv'",
        ),
        (["compare", "MODEL", "absent.jsonl", "--scores", "{scores}"], "no such file"),
        (["run", "MODEL", "absent.jsonl", "-o", "{folder}/run"], "no such file"),
        (["score", "MODEL", "prose", "--graph", "--device", "cpu"], "`--graph` needs a CUDA device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    command: list[str],
    match: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("plop_ext.models.load_model", lambda *_, **__: pytest.fail("loaded"))
    paths = {"scores": save_scores(tmp_path), "placement": save_placement(tmp_path), "folder": tmp_path}
    assert match in refusal([*(argument.format(**paths) for argument in command), "--quiet"], capsys)
