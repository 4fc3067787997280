"""Messages in the words of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plop_ext.cli.wording import command_words
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("`source` 'x': no such file", "`DATA` 'x': no such file"),
        ("`max_samples` must be 1, `learning_rate` too", "`--samples` must be 1, `--lr` too"),
        ("`token_step`=9; `q_proj` and `model.unload()` stay", "`--token-step`=9; `q_proj` and `model.unload()` stay"),
    ],
)
def test_arguments_get_the_names_of_the_options(message: str, words: str) -> None:
    assert command_words(message) == words


def test_a_command_may_have_names_of_its_own() -> None:
    assert command_words("`types`, `seed`", {"types": "--settle-types"}) == "`--settle-types`, `--seed`"


def test_what_is_logged_speaks_of_options_too(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("a text of more than eight tokens\n" * 4)
    command = [sys.executable, "-m", "plop_ext", "score", "plop-tiny", "d.txt", "--max-length", "8", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--device", "cpu"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "plop: 4 of 4 samples were truncated to `--max-length` = 8 tokens" in done.stderr.splitlines()
