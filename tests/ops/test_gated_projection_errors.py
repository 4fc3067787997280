"""Every error of `gated_projection_`, with the same text from the native kernel, the fake and the PyTorch kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plop_ext import ops
from tests.support.op_errors import Case, check_devices, check_errors, kernels_of, moved

OP = "gated_projection_"
SUMS = ("gate_sumsq", "up_sumsq", "out_sumsq")


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


ARGUMENTS: dict[str, Any] = {
    "out": zeros(4, 16),
    "x": zeros(4, 24),
    "gate_weight": zeros(16, 24),
    "up_weight": zeros(16, 24),
    "activation": "silu",
    "gate_sumsq": torch.zeros(4),
    "up_sumsq": torch.zeros(4),
    "out_sumsq": torch.zeros(4),
    "step": 1,
    "phase": 0,
}
FLOAT32 = {
    name: zeros(*ARGUMENTS[name].shape, dtype=torch.float32) for name in ("out", "x", "gate_weight", "up_weight")
}
ERRORS: dict[str, Case] = {
    "x int": ({"x": zeros(4, 24, dtype=torch.int32)}, "x must be float32, float16 or bfloat16, got Int"),
    "float32": (FLOAT32, "x must be float16 or bfloat16, got Float"),
    "out half": ({"out": zeros(4, 16, dtype=torch.float16)}, "out must be BFloat16, got Half"),
    "weight half": ({"up_weight": zeros(16, 24, dtype=torch.float16)}, "up_weight must be BFloat16, got Half"),
    "sums bfloat16": ({"up_sumsq": zeros(4)}, "up_sumsq must be Float, got BFloat16"),
    "x dims": ({"x": zeros(1, 4, 24)}, "x must have 2 dimensions, got 3"),
    "sums dims": ({"out_sumsq": torch.zeros(4, 1)}, "out_sumsq must have 1 dimensions, got 2"),
    "x width": ({"x": zeros(4, 12)}, "x must have a multiple of 8 as last size, got 12"),
    "x no width": ({"x": zeros(4, 0)}, "x must have a multiple of 8 as last size, got 0"),
    "out width": ({"out": zeros(4, 12)}, "out must have a multiple of 8 as last size, got 12"),
    "gate shape": ({"gate_weight": zeros(24, 16)}, "gate_weight must have shape [16, 24], got [24, 16]"),
    "up shape": ({"up_weight": zeros(8, 24)}, "up_weight must have shape [16, 24], got [8, 24]"),
    "out rows": ({"out": zeros(3, 16)}, "out must have shape [4, 16], got [3, 16]"),
    "x strided": ({"x": zeros(4, 48)[:, :24]}, "x must be contiguous, got a strided view"),
    "up strided": ({"up_weight": zeros(24, 16).T}, "up_weight must be contiguous, got a strided view"),
    "out offset": ({"out": zeros(65)[1:].view(4, 16)}, "out must start at a multiple of 8 elements, got offset 1"),
    "activation": ({"activation": "relu"}, "activation must be silu or gelu_tanh, got relu"),
    "step": ({"step": 0}, "step must be at least 1, got 0"),
    "phase": ({"step": 2, "phase": 2}, "phase must be in [0, step), got 2"),
    "sums": ({"gate_sumsq": torch.zeros(3)}, "gate_sumsq must have 4 elements, got 3"),
    "sums of every second": ({"step": 2, "gate_sumsq": None}, "up_sumsq must have 2 elements, got 4"),
}


def test_the_arguments_without_a_change_are_right(device: torch.device) -> None:
    for kernel in kernels_of(OP).values():
        kernel(**moved(ARGUMENTS, device))


def test_errors(device: torch.device) -> None:
    check_errors(OP, ARGUMENTS, ERRORS, device)


def test_two_devices(device: torch.device) -> None:
    check_devices(OP, ARGUMENTS, ["out", "gate_weight", "up_weight", *SUMS], device)


def test_a_failed_call_writes_nothing(device: torch.device) -> None:
    arguments = moved({**ARGUMENTS, "step": 2}, device)
    for name in ("out", *SUMS):
        arguments[name].fill_(7)
    with pytest.raises(RuntimeError, match="elements, got"):
        ops.gated_projection_(**arguments)
    assert all((arguments[name] == 7).all() for name in ("out", *SUMS))
