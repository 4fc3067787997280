"""Whatever ends a command, ends it with one line and one of the documented exit codes."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plop_ext.cli.exit_codes import ExitCode
from plop_ext.cli.main import main
from plop_ext.errors import InputError, OutputError, SetupError
from tests.support.paths import ROOT
from tests.support.saved_scores import save_scores


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("`strategy` is wrong; fix it"), 2, "plop: `--strategy` is wrong; fix it"),
        (OutputError("cannot write"), 2, "plop: cannot write"),
        (SetupError("no PEFT"), 2, "plop: no PEFT"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "plop: cannot use `x`: No such file; "),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "plop: cannot use standard output: No space left"),
        (MemoryError(), 2, "plop: out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "plop: out of memory (CUDA out of memory); lower"),
        (KeyboardInterrupt(), 130, "plop: interrupted"),
        (ZeroDivisionError("division by zero\nsecond line"), 1, "plop: defect: ZeroDivisionError: division by zero; "),
    ],
)
def test_an_exception_is_one_line(
    error: BaseException,
    code: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("plop_ext.scores.Scores.load", fail)
    assert main(["place", "scores.json"]) == code
    (found,) = capsys.readouterr().err.strip().splitlines()
    assert found.startswith(line)
    logs = list(tmp_path.glob("plop-*.log"))
    assert len(logs) == (code == ExitCode.DEFECT)
    for log in logs:
        assert str(log) in found and "Traceback" in log.read_text() and "division by zero" in log.read_text()


def test_the_page_lists_the_codes() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "command.md").read_text(), flags=re.MULTILINE)
    assert [int(row) for row in rows] == [code.value for code in ExitCode]


def test_a_reader_that_leaves_early_does_not_end_the_command(tmp_path: Path) -> None:
    output = tmp_path / "r.html"
    command = [sys.executable, "-m", "plop_ext", "report", str(save_scores(tmp_path)), "-o", str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 0, said
    assert output.is_file() and b"Traceback" not in said
