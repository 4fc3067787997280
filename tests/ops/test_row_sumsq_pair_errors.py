"""Every error of `row_sumsq_pair_`, with the same text from the native kernel, the fake and the PyTorch kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plop_ext import ops
from tests.support.op_errors import F64, Case, check_devices, check_errors, kernels_of, moved, zeros

OP = "row_sumsq_pair_"
HALF = {"x": zeros(4, 6, dtype=torch.float16), "y": zeros(4, 5, dtype=torch.float16)}
DOUBLE = {"x": zeros(4, 6, dtype=F64), "y": zeros(4, 5, dtype=F64)}

ERRORS: dict[str, Case] = {
    "x int": ({"x": zeros(4, 6, dtype=torch.int32)}, "x must be float32, float64, float16 or bfloat16, got Int"),
    "y half": ({"y": zeros(4, 5, dtype=torch.float16)}, "y must be Float, got Half"),
    "y int": ({"y": zeros(4, 5, dtype=torch.int32)}, "y must be Float, got Int"),
    "x half": ({"x": zeros(4, 6, dtype=torch.float16)}, "y must be Half, got Float"),
    "out half": ({"out": zeros(8, dtype=torch.float16)}, "out must be Float, got Half"),
    "out float for double": (DOUBLE, "out must be Double, got Float"),
    "bias double": ({"bias": zeros(5, dtype=F64)}, "bias must be Float, got Double"),
    "bias float for double": (
        {**DOUBLE, "out": zeros(8, dtype=F64), "bias": zeros(5)},
        "bias must be Double, got Float",
    ),
    "bias other half": ({**HALF, "bias": zeros(5, dtype=torch.bfloat16)}, "bias must be Half or Float, got BFloat16"),
    "x vector": ({"x": zeros(6)}, "x must have 2 or 3 dimensions, got 1"),
    "y 4-D": ({"y": zeros(1, 2, 2, 5)}, "y must have 2 or 3 dimensions, got 4"),
    "out matrix": ({"out": zeros(2, 4)}, "out must have 1 dimensions, got 2"),
    "out strided": ({"out": zeros(16)[::2]}, "out must be contiguous, got a strided view"),
    "bias matrix": ({"bias": zeros(1, 5)}, "bias must have 1 dimensions, got 2"),
    "bias strided": ({"bias": zeros(10)[::2]}, "bias must be contiguous, got a strided view"),
    "bias as wide as x": ({"bias": zeros(6)}, "bias must have 5 elements, got 6"),
    "bias per inner row": ({"y": zeros(2, 2, 5), "bias": zeros(4, 5)}, "bias must have 10 elements, got 20"),
    "y short": ({"y": zeros(3, 5)}, "y must have 4 rows, got 3"),
    "y 3-D": ({"y": zeros(4, 4, 5)}, "y must have 4 rows, got 16"),
    "step 0": ({"step": 0}, "step must be at least 1, got 0"),
    "phase negative": ({"step": 2, "phase": -1}, "phase must be in [0, step), got -1"),
    "phase is step": ({"step": 2, "phase": 2}, "phase must be in [0, step), got 2"),
    "out for one": ({"out": zeros(4)}, "out must have 8 elements, got 4"),
    "out ignores step": ({"step": 3, "phase": 2}, "out must have 2 elements, got 8"),
    "out of no row": ({"step": 9, "phase": 8}, "out must have 0 elements, got 8"),
}


def arguments() -> dict[str, Any]:
    return {"out": zeros(8), "x": zeros(4, 6), "y": zeros(4, 5), "bias": None, "step": 1, "phase": 0}


def test_the_arguments_without_a_change_are_right(device: torch.device) -> None:
    for kernel in kernels_of(OP).values():
        kernel(**moved(arguments(), device))


def test_errors(device: torch.device) -> None:
    check_errors(OP, arguments(), ERRORS, device)


def test_two_devices(device: torch.device) -> None:
    check_devices(OP, {**arguments(), "bias": zeros(5)}, ["out", "y", "bias"], device)


def test_a_failed_call_writes_nothing(device: torch.device) -> None:
    out = torch.full((8,), 7.0, device=device)
    with pytest.raises(RuntimeError, match="bias must have 5 elements"):
        ops.row_sumsq_pair_(out, *(torch.ones(4, width, device=device) for width in (6, 5)), zeros(6).to(device))
    assert (out == 7).all()
