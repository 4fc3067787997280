"""`run_experiment` killed at random moments ends with the result of an uninterrupted run, to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

KILLS = 20


def result(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "result.json").read_text())
    del content["timing"]
    return content


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.killed_run", str(tmp_path), str(KILLS), "0"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{KILLS} kills" in done.stdout
    whole, *others = sorted(tmp_path.iterdir(), key=lambda folder: folder.name != "whole")
    files = {"adapter", "journal.jsonl", "placement.json", "report.html", "result.json", "scores.json"}
    for folder in (whole, *others):
        assert {path.name for path in folder.iterdir()} == files
        assert result(folder) == result(whole)
        for name in ("adapter/adapter_model.safetensors", "placement.json"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()
        lines = (folder / "journal.jsonl").read_bytes().splitlines()
        trials = [json.loads(line)["trial"] for line in lines[2:]]
        assert len(trials) == len({json.dumps(trial) for trial in trials})  # none was run twice
