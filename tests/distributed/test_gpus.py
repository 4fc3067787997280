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


def test_two_gpus_are_bitwise_one() -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.support.on_gpus"]
    done = subprocess.run([sys.executable, *launch], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    assert sorted(line["rank"] for line in lines) == [0, 1]
    for line in lines:
        assert len(line["differences"]) == 16
        assert {name: value for name, value in line["differences"].items() if value} == {}
