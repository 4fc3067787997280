"""Two GPUs over NCCL: bitwise the scores of one, for replicas, DDP and FSDP2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def differences(module: str) -> list[dict[str, float]]:
    """What a module of the tests' support prints on each of two GPUs."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    done = subprocess.run([sys.executable, *launch], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    assert sorted(line["rank"] for line in lines) == [0, 1]
    return [line["differences"] for line in lines]


def test_two_gpus_are_bitwise_one() -> None:
    for found in differences("tests.support.on_gpus"):
        assert len(found) == 16
        assert {name: value for name, value in found.items() if value} == {}


def test_two_gpus_that_divide_a_model_are_as_one() -> None:
    """Products over parts of a matrix are rounded in another order."""
    for found in differences("tests.support.on_gpus_divided"):
        assert len(found) == 7
        assert {name: value for name, value in found.items() if not isinstance(value, float)} == {}
        assert {name: value for name, value in found.items() if value > (1e-5 if " TP" in name else 0)} == {}
