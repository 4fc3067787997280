"""`plop export`: a text on stdout or in a file, exit 2 for what a stack cannot say, and each loss said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from plop_ext.cli.main import main
from plop_ext.placement import Placement, exports
from tests.support.saved_scores import ranked


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    path = tmp_path / "placement.json"
    ranked().place(types=3, r=8, ranks="inverse-nfn").save(path)
    return str(path)


def test_what_a_stack_cannot_say_is_one_line_and_exit_2(uneven: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", uneven, "--to", "trl"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "plop: `lowest-3` cannot be exported to TRL exactly: it has one rank for all modules: 7 instead of 4 to 13; "
        "set `--lossy` to write the rest, or name another stack\n"
    )


def test_what_is_lost_is_said_on_stderr_and_in_a_comment(uneven: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", uneven, "--to", "trl", "--lossy"]) == 0
    captured = capsys.readouterr()
    line = "it has one rank for all modules: 7 instead of 4 to 13"
    assert captured.err == f"not as placed: {line}\n" and f"# Not as placed: {line}\n" in captured.out
    assert yaml.safe_load(captured.out)["lora_r"] == 7
    assert main(["export", uneven, "--to", "axolotl"]) == 0
    assert capsys.readouterr().err == ""


def test_the_text_is_that_of_python(uneven: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Placement.load(uneven).export("axolotl")
    assert main(["export", uneven, "--to", "axolotl"]) == 0
    assert capsys.readouterr().out == text
    output = tmp_path / "lora.yaml"
    assert main(["export", uneven, "--to", "axolotl", "-o", str(output)]) == 0
    assert output.read_text() == text and capsys.readouterr().out == f"Axolotl: {output}\n"
    assert main(["export", uneven, "--to", "axolotl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "stack": "axolotl",
        "file": None,
        "text": text,
        "modules": 12,
        "losses": [],
        "notes": [],
    }


def test_rank_and_alpha_are_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "placement.json"
    ranked().place(types=1).save(path)
    assert main(["export", str(path), "--to", "ms-swift", "--rank", "4", "--alpha", "6"]) == 0
    keys = yaml.safe_load(capsys.readouterr().out)
    assert (keys["lora_rank"], keys["lora_alpha"]) == (4, 6)
    assert main(["export", str(path), "--to", "ms-swift", "--rank", "99"]) == 2
    assert "`--rank` must be at most" in capsys.readouterr().err


def test_an_unknown_stack_names_those_there_are(uneven: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", uneven, "--to", "nope"]) == 2
    assert capsys.readouterr().err == f"plop: `--to` must be one of {', '.join(exports.stacks())}, got 'nope'\n"
    assert main(["export", uneven, "--to", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(exports.stacks())


def test_placing_for_an_engine_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores, output = tmp_path / "scores.json", tmp_path / "p.json"
    ranked().save(scores)
    assert main(["place", str(scores), "--serve", "vllm", "--rank", "12", "-o", str(output)]) == 0
    assert "to serve it with vLLM 0.33.0: --enable-lora --max-lora-rank 16" in capsys.readouterr().out
    assert main(["place", str(scores), "--serve", "sglang", "--ranks", "inverse-nfn"]) == 2
    assert "`--ranks`: SGLang applies one rank" in capsys.readouterr().err
