"""Every error of the ops, with the same text from the native kernel, the fake and the PyTorch kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plop_ext import ops
from tests.support.op_errors import F64, check, moved, zeros

ROW_SUMSQ = {
    "native": ops.row_sumsq_,
    "fake": ops.row_sumsq_fake,
    "pytorch": ops.row_sumsq_pytorch,
}
GAIN_TOTALS = {
    "native": ops.gain_totals_,
    "fake": ops.gain_totals_fake,
    "pytorch": ops.gain_totals_pytorch,
}


ROW_SUMSQ_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "x int": ({"x": zeros(4, 6, dtype=torch.int32)}, "x must be float32, float64, float16 or bfloat16, got Int"),
    "x int8": ({"x": zeros(4, 6, dtype=torch.int8)}, "x must be float32, float64, float16 or bfloat16, got Char"),
    "x complex": (
        {"x": zeros(4, 6, dtype=torch.complex64)},
        "x must be float32, float64, float16 or bfloat16, got ComplexFloat",
    ),
    "out half": ({"out": zeros(4, dtype=torch.float16)}, "out must be Float, got Half"),
    "out double": ({"out": zeros(4, dtype=F64)}, "out must be Float, got Double"),
    "out float for double": ({"x": zeros(4, 6, dtype=F64)}, "out must be Double, got Float"),
    "bias double": ({"bias": zeros(6, dtype=F64)}, "bias must be Float, got Double"),
    "bias int": ({"bias": zeros(6, dtype=torch.int32)}, "bias must be Float, got Int"),
    "bias float for double": (
        {"x": zeros(4, 6, dtype=F64), "out": zeros(4, dtype=F64), "bias": zeros(6)},
        "bias must be Double, got Float",
    ),
    "bias other half": (
        {"x": zeros(4, 6, dtype=torch.float16), "bias": zeros(6, dtype=torch.bfloat16)},
        "bias must be Half or Float, got BFloat16",
    ),
    "x vector": ({"x": zeros(6)}, "x must have 2 or 3 dimensions, got 1"),
    "x 4-D": ({"x": zeros(1, 2, 2, 6)}, "x must have 2 or 3 dimensions, got 4"),
    "out matrix": ({"out": zeros(4, 1)}, "out must have 1 dimensions, got 2"),
    "out strided": ({"out": zeros(8)[::2]}, "out must be contiguous, got a strided view"),
    "bias matrix": ({"bias": zeros(1, 6)}, "bias must have 1 dimensions, got 2"),
    "bias strided": ({"bias": zeros(12)[::2]}, "bias must be contiguous, got a strided view"),
    "bias short": ({"bias": zeros(5)}, "bias must have 6 elements, got 5"),
    "step 0": ({"step": 0}, "step must be at least 1, got 0"),
    "step negative": ({"step": -2}, "step must be at least 1, got -2"),
    "phase negative": ({"step": 2, "phase": -1}, "phase must be in [0, step), got -1"),
    "phase is step": ({"step": 2, "phase": 2}, "phase must be in [0, step), got 2"),
    "out long": ({"out": zeros(5)}, "out must have 4 elements, got 5"),
    "out short": ({"out": zeros(3)}, "out must have 4 elements, got 3"),
    "out ignores step": ({"step": 3, "phase": 2}, "out must have 1 elements, got 4"),
    "out of no row": ({"step": 9, "phase": 8}, "out must have 0 elements, got 4"),
}

GAIN_TOTALS_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "totals float": ({"totals": zeros(3, 2, 5)}, "totals must be Double, got Float"),
    "counted byte": ({"counted": zeros(4, dtype=torch.uint8)}, "counted must be Bool, got Byte"),
    "offsets int": ({"offsets": zeros(3, dtype=torch.int32)}, "offsets must be Long, got Int"),
    "sumsq half": ({"sumsq": zeros(8, dtype=torch.float16)}, "sumsq must be float32 or float64, got Half"),
    "sumsq int": ({"sumsq": zeros(8, dtype=torch.int64)}, "sumsq must be float32 or float64, got Long"),
    "totals matrix": ({"totals": zeros(3, 5, dtype=F64)}, "totals must have 3 dimensions, got 2"),
    "totals strided": ({"totals": zeros(3, 2, 10, dtype=F64)[..., ::2]}, "totals must be contiguous"),
    "totals fields": ({"totals": zeros(3, 2, 4, dtype=F64)}, "totals must be [M, B, 5], got 4 fields"),
    "sumsq matrix": ({"sumsq": zeros(2, 4)}, "sumsq must have 1 dimensions, got 2"),
    "sumsq strided": ({"sumsq": zeros(16)[::2]}, "sumsq must be contiguous, got a strided view"),
    "counted matrix": ({"counted": zeros(2, 2, dtype=torch.bool)}, "counted must have 1 dimensions, got 2"),
    "counted strided": ({"counted": zeros(8, dtype=torch.bool)[::2]}, "counted must be contiguous"),
    "offsets matrix": ({"offsets": zeros(3, 1, dtype=torch.int64)}, "offsets must have 1 dimensions, got 2"),
    "offsets strided": ({"offsets": zeros(6, dtype=torch.int64)[::2]}, "offsets must be contiguous"),
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


def row_sumsq_arguments() -> dict[str, Any]:
    return {"out": zeros(4), "x": zeros(4, 6), "bias": None, "step": 1, "phase": 0}


def gain_totals_arguments() -> dict[str, Any]:
    return {
        "totals": zeros(3, 2, 5, dtype=F64),
        "sumsq": zeros(8),
        "counted": torch.ones(4, dtype=torch.bool),
        "offsets": torch.tensor([0, 2, 4]),
        "records": [0, 0, 4],
    }


def test_the_arguments_without_a_change_are_right(device: torch.device) -> None:
    for kernel in ROW_SUMSQ.values():
        kernel(**moved(row_sumsq_arguments(), device))
    for kernel in GAIN_TOTALS.values():
        kernel(**moved(gain_totals_arguments(), device))


@pytest.mark.parametrize("case", ROW_SUMSQ_ERRORS)
@pytest.mark.parametrize("kernel", ROW_SUMSQ)
def test_row_sumsq_errors(device: torch.device, kernel: str, case: str) -> None:
    check(ROW_SUMSQ[kernel], row_sumsq_arguments(), "row_sumsq_", *ROW_SUMSQ_ERRORS[case], device)


@pytest.mark.parametrize("case", GAIN_TOTALS_ERRORS)
@pytest.mark.parametrize("kernel", GAIN_TOTALS)
def test_gain_totals_errors(device: torch.device, kernel: str, case: str) -> None:
    check(GAIN_TOTALS[kernel], gain_totals_arguments(), "gain_totals_", *GAIN_TOTALS_ERRORS[case], device)


@pytest.mark.parametrize("name", ["out", "bias"])
def test_row_sumsq_on_two_devices(device: torch.device, name: str) -> None:
    arguments = moved({**row_sumsq_arguments(), "bias": zeros(6)}, device)
    arguments[name] = arguments[name].to("meta")
    for kernel in ROW_SUMSQ.values():
        with pytest.raises(RuntimeError, match=rf"row_sumsq_: {name} must be on {device.type}(:0)?, got meta"):
            kernel(**arguments)


@pytest.mark.parametrize("name", ["totals", "counted", "offsets"])
def test_gain_totals_on_two_devices(device: torch.device, name: str) -> None:
    arguments = moved(gain_totals_arguments(), device)
    arguments[name] = arguments[name].to("meta")
    for kernel in GAIN_TOTALS.values():
        with pytest.raises(RuntimeError, match=rf"gain_totals_: {name} must be on {device.type}(:0)?, got meta"):
            kernel(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["out", "bias"])
def test_row_sumsq_between_cpu_and_cuda(name: str) -> None:
    for place, other in (("cuda", "cpu"), ("cpu", "cuda")):
        arguments = moved({**row_sumsq_arguments(), "bias": zeros(6)}, torch.device(place))
        arguments[name] = arguments[name].to(other)
        for kernel in ROW_SUMSQ.values():
            with pytest.raises(RuntimeError, match=rf"{name} must be on {place}(:0)?, got {other}(:0)?"):
                kernel(**arguments)


def test_a_failed_call_writes_nothing(device: torch.device) -> None:
    out = torch.full((4,), 7.0, device=device)
    with pytest.raises(RuntimeError, match="bias must have 6 elements"):
        ops.row_sumsq_(out, torch.ones(4, 6, device=device), torch.ones(5, device=device))
    arguments = moved({**gain_totals_arguments(), "records": [0, 0, 4, 5, 0, 4]}, device)
    with pytest.raises(RuntimeError, match="records must name modules"):
        ops.gain_totals_(**arguments)
    assert (out == 7).all() and (arguments["totals"] == 0).all()
