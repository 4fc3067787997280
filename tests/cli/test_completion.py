"""The shells complete commands, options, choices and file names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from plop_ext.cli.completion import SHELLS
from plop_ext.cli.main import build_parser, main

# Completes the last word of `COMP_WORDS` as an interactive bash would, and prints what it offers.
ASK = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
complete_with=$(complete -p plop | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$complete_with plop "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", shell])
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("plop pla", {"place"}),
        ("plop place --max-p", {"--max-params"}),
        ("plop place --strategy inv", {"inverse"}),
        ("plop place sco", {"scores.json"}),
        ("plop compare MODEL DATA --scores sco", {"scores.json"}),
        ("plop run MODEL DATA -o fol", {"folder"}),
    ],
)
def test_bash_offers(words: str, offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script.bash").write_text(script("bash", capsys))
    (tmp_path / "scores.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    asked = ASK.format(script="script.bash", words=words)
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = script(shell, capsys)
    for name in build_parser()[1]:
        assert name in printed


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", "ksh"]) == 2
    assert "invalid choice: 'ksh'" in capsys.readouterr().err
