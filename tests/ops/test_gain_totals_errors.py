"""Every error of `gain_totals_`, with the same text from the native kernel, the fake and the PyTorch kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plop_ext import ops
from tests.support.op_errors import F64, Case, check_devices, check_errors, kernels_of, moved, zeros

OP = "gain_totals_"
ERRORS: dict[str, Case] = {
    "totals float": ({"totals": zeros(3, 2, 5)}, "totals must be Double, got Float"),
    "counted byte": ({"counted": zeros(4, dtype=torch.uint8)}, "counted must be Bool, got Byte"),
    "offsets int": ({"offsets": zeros(3, dtype=torch.int32)}, "offsets must be Long, got Int"),
    "sumsq half": ({"sumsq": zeros(8, dtype=torch.float16)}, "sumsq must be float32 or float64, got Half"),
    "sumsq int": ({"sumsq": zeros(8, dtype=torch.int64)}, "sumsq must be float32 or float64, got Long"),
    "totals matrix": ({"totals": zeros(3, 5, dtype=F64)}, "totals must have 3 dimensions, got 2"),
    "totals strided": (
        {"totals": zeros(3, 2, 10, dtype=F64)[..., ::2]},
        "totals must be contiguous, got a strided view",
    ),
    "totals fields": ({"totals": zeros(3, 2, 4, dtype=F64)}, "totals must be [M, B, 5], got 4 fields"),
    "sumsq matrix": ({"sumsq": zeros(2, 4)}, "sumsq must have 1 dimensions, got 2"),
    "sumsq strided": ({"sumsq": zeros(16)[::2]}, "sumsq must be contiguous, got a strided view"),
    "counted matrix": ({"counted": zeros(2, 2, dtype=torch.bool)}, "counted must have 1 dimensions, got 2"),
    "counted strided": (
        {"counted": zeros(8, dtype=torch.bool)[::2]},
        "counted must be contiguous, got a strided view",
    ),
    "offsets matrix": ({"offsets": zeros(3, 1, dtype=torch.int64)}, "offsets must have 1 dimensions, got 2"),
    "offsets strided": (
        {"offsets": zeros(6, dtype=torch.int64)[::2]},
        "offsets must be contiguous, got a strided view",
    ),
    "offsets short": ({"offsets": zeros(2, dtype=torch.int64)}, "offsets must have 3 elements, got 2"),
    "no triples": ({"records": [0, 0]}, "records must be (module, in_start, out_start) triples, got 2 numbers"),
    "module negative": ({"records": [-1, 0, 4]}, "records must name modules in [0, 3), got -1"),
    "module large": ({"records": [0, 0, 4, 3, 0, 4]}, "records must name modules in [0, 3), got 3"),
    "in negative": ({"records": [0, -1, 4]}, "records must start in [0, 4], got -1 and 4"),
    "in large": ({"records": [0, 5, 4]}, "records must start in [0, 4], got 5 and 4"),
    "out large": ({"records": [0, 0, 5]}, "records must start in [0, 4], got 0 and 5"),
    "out negative": ({"records": [0, 0, -3]}, "records must start in [0, 4], got 0 and -3"),
    "module twice": ({"records": [1, 0, 4, 1, 0, 4]}, "records must name each module once, got module 1 twice"),
}


def arguments() -> dict[str, Any]:
    return {
        "totals": zeros(3, 2, 5, dtype=F64),
        "sumsq": zeros(8),
        "counted": torch.ones(4, dtype=torch.bool),
        "offsets": torch.tensor([0, 2, 4]),
        "records": [0, 0, 4],
    }


def test_the_arguments_without_a_change_are_right(device: torch.device) -> None:
    for kernel in kernels_of(OP).values():
        kernel(**moved(arguments(), device))


def test_errors(device: torch.device) -> None:
    check_errors(OP, arguments(), ERRORS, device)


def test_two_devices(device: torch.device) -> None:
    check_devices(OP, arguments(), ["totals", "counted", "offsets"], device)


def test_a_failed_call_writes_nothing(device: torch.device) -> None:
    given = moved({**arguments(), "records": [0, 0, 4, 5, 0, 4]}, device)
    with pytest.raises(RuntimeError, match="records must name modules"):
        ops.gain_totals_(**given)
    assert (given["totals"] == 0).all()
