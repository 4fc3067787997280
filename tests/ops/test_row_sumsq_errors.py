"""Every error of `row_sumsq_`, with the same text from the native kernel, the fake and the PyTorch kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plop_ext import ops
from tests.support.op_errors import F64, Case, check_devices, check_errors, kernels_of, moved, zeros

OP = "row_sumsq_"
ERRORS: dict[str, Case] = {
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


def arguments() -> dict[str, Any]:
    return {"out": zeros(4), "x": zeros(4, 6), "bias": None, "step": 1, "phase": 0}


def test_the_arguments_without_a_change_are_right(device: torch.device) -> None:
    for kernel in kernels_of(OP).values():
        kernel(**moved(arguments(), device))


def test_errors(device: torch.device) -> None:
    check_errors(OP, arguments(), ERRORS, device)


def test_two_devices(device: torch.device) -> None:
    check_devices(OP, {**arguments(), "bias": zeros(6)}, ["out", "bias"], device)


@pytest.mark.gpu
@pytest.mark.parametrize("place, other", [("cuda", "cpu"), ("cpu", "cuda")])
def test_between_cpu_and_cuda(place: str, other: str) -> None:
    check_devices(OP, {**arguments(), "bias": zeros(6)}, ["out", "bias"], torch.device(place), other)


def test_a_failed_call_writes_nothing(device: torch.device) -> None:
    out = torch.full((4,), 7.0, device=device)
    with pytest.raises(RuntimeError, match="bias must have 6 elements"):
        ops.row_sumsq_(out, torch.ones(4, 6, device=device), torch.ones(5, device=device))
    assert (out == 7).all()


def test_released_storage_is_refused() -> None:
    """FSDP 1 frees the memory of weights between forwards; a read of it ends the process, and a CUDA context."""
    weight = torch.randn(64, 64)
    view = weight.view(64, 64)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="row_sumsq_: x must have memory, got released storage"):
        ops.row_sumsq_(torch.empty(64), view)
    ops.row_sumsq_(torch.empty(0), torch.empty(0, 4))
