"""Every error of the fused ops, with the same text from the native kernel, the fake and the PyTorch kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.fused_ops import FUSED_OPS
from tests.support.op_errors import Case, check_devices, check_errors, kernels_of, moved, zeros


def shifted(*shape: int) -> torch.Tensor:
    """Starts one element into its storage."""
    return zeros(zeros(*shape).numel() + 1)[1:].view(shape)


def wide(*shape: int) -> torch.Tensor:
    """Rows twice as far apart as contiguous ones."""
    return zeros(*shape[:-1], 2 * shape[-1])[..., : shape[-1]]


ARGUMENTS: dict[str, dict[str, Any]] = {
    "add_rms_norm_": {
        "normed": zeros(4, 16),
        "hidden": zeros(4, 16),
        "x": zeros(4, 16),
        "residual": zeros(4, 16),
        "weight": zeros(16),
        "eps": 1e-5,
        "inner_weight": zeros(16),
        "inner_eps": 1e-5,
        "unit_offset": False,
        "bias": zeros(16),
        "x_sumsq": zeros(4),
        "normed_sumsq": zeros(4),
        "step": 1,
        "phase": 0,
    },
    "gated_activation_": {
        "out": zeros(4, 16),
        "gate": zeros(4, 16),
        "up": zeros(4, 16),
        "activation": "silu",
        "gate_bias": zeros(16),
        "up_bias": zeros(16),
        "gate_sumsq": zeros(4),
        "up_sumsq": zeros(4),
        "out_sumsq": zeros(4),
        "step": 1,
        "phase": 0,
    },
    "rotary_": {
        "q_out": zeros(2, 3, 4, 32),
        "k_out": zeros(2, 3, 2, 32),
        "q": zeros(2, 3, 4, 32),
        "k": zeros(2, 3, 2, 32),
        "cos": zeros(2, 3, 16),
        "sin": zeros(2, 3, 16),
        "q_weight": zeros(32),
        "k_weight": zeros(32),
        "eps": 1e-5,
        "unit_offset": False,
        "q_bias": zeros(128),
        "k_bias": zeros(64),
        "q_sumsq": zeros(6),
        "k_sumsq": zeros(6),
        "step": 1,
        "phase": 0,
    },
}
FIRST = {"add_rms_norm_": "x", "gated_activation_": "gate", "rotary_": "q"}


def tensors(op: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in ARGUMENTS[op].items() if isinstance(value, torch.Tensor)}


def common(op: str) -> dict[str, Case]:
    """The errors that every tensor of an op has."""
    first, cases = FIRST[op], dict[str, Case]()
    for name, value in tensors(op).items():
        is_sum, rank = name.endswith("sumsq"), value.dim()
        if name == first:
            text = f"{name} must be float32, float16 or bfloat16, got"
            cases[f"{name} double"] = {name: value.double()}, f"{text} Double"
            cases[f"{name} int"] = {name: value.int()}, f"{text} Int"
            cases[f"{name} alone half"] = {name: value.half()}, f"{next(iter(ARGUMENTS[op]))} must be Half, got Float"
        else:
            cases[f"{name} half"] = {name: value.half()}, f"{name} must be Float, got Half"
            cases[f"{name} double"] = {name: value.double()}, f"{name} must be Float, got Double"
        cases[f"{name} rank"] = {name: value[None]}, f"{name} must have {rank} dimensions, got {rank + 1}"
        if is_sum:
            rows = len(value)
            cases[f"{name} long"] = {name: zeros(rows + 1)}, f"{name} must have {rows} elements, got {rows + 1}"
            cases[f"{name} strided"] = {name: wide(rows, 1)[:, 0]}, f"{name} must be contiguous, got a strided view"
            continue
        if rank == 1:
            size = len(value)
            cases[f"{name} short"] = {name: zeros(size - 8)}, f"{name} must have {size} elements, got {size - 8}"
            cases[f"{name} strided"] = {name: wide(size, 1)[:, 0]}, f"{name} must be contiguous, got a strided view"
        elif name not in ("gate", "up", "q", "k"):
            cases[f"{name} strided"] = {name: wide(*value.shape)}, f"{name} must be contiguous, got a strided view"
        text = f"{name} must start at a multiple of 8 elements, got offset 1"
        cases[f"{name} misaligned"] = {name: shifted(*value.shape)}, text
    cases["step 0"] = {"step": 0}, "step must be at least 1, got 0"
    cases["step negative"] = {"step": -2}, "step must be at least 1, got -2"
    cases["phase negative"] = {"step": 2, "phase": -1}, "phase must be in [0, step), got -1"
    cases["phase is step"] = {"step": 2, "phase": 2}, "phase must be in [0, step), got 2"
    sums = [name for name in tensors(op) if name.endswith("sumsq")]
    rows = len(ARGUMENTS[op][sums[0]])
    cases["sums ignore step"] = (
        {"step": 3, "phase": 2},
        f"{sums[0]} must have {(rows - 3) // 3 + 1} elements, got {rows}",
    )
    cases["sums of no row"] = {"step": 9, "phase": 8}, f"{sums[0]} must have 0 elements, got {rows}"
    return cases


def all_of(op: str, width: int) -> dict[str, torch.Tensor]:
    """Every tensor of a matrix op with another last size."""
    return {
        name: value if name.endswith("sumsq") else zeros(*value.shape[:-1], width)
        for name, value in tensors(op).items()
    }


OWN: dict[str, dict[str, Case]] = {
    "add_rms_norm_": {
        "width 12": (all_of("add_rms_norm_", 12), "x must have a multiple of 8 up to 16384 as last size, got 12"),
        "width 0": (all_of("add_rms_norm_", 0), "x must have a multiple of 8 up to 16384 as last size, got 0"),
        "width large": (
            all_of("add_rms_norm_", 16392),
            "x must have a multiple of 8 up to 16384 as last size, got 16392",
        ),
        "normed rows": ({"normed": zeros(5, 16)}, "normed must have shape [4, 16], got [5, 16]"),
        "hidden width": ({"hidden": zeros(4, 8)}, "hidden must have shape [4, 16], got [4, 8]"),
        "residual transposed": ({"residual": zeros(16, 4)}, "residual must have shape [4, 16], got [16, 4]"),
    },
    "gated_activation_": {
        "width 12": (all_of("gated_activation_", 12), "gate must have a multiple of 8 as last size, got 12"),
        "width 0": (all_of("gated_activation_", 0), "gate must have a multiple of 8 as last size, got 0"),
        "out rows": ({"out": zeros(3, 16)}, "out must have shape [4, 16], got [3, 16]"),
        "up width": ({"up": zeros(4, 24)}, "up must have shape [4, 16], got [4, 24]"),
        "gate columns": (
            {"gate": zeros(16, 4).T},
            "gate must have strides (s, 1), s a multiple of 8, got (1, 4)",
        ),
        "up odd rows": (
            {"up": zeros(4, 20)[:, :16]},
            "up must have strides (s, 1), s a multiple of 8, got (20, 1)",
        ),
        "activation": ({"activation": "relu"}, "activation must be silu or gelu_tanh, got relu"),
    },
    "rotary_": {
        "width 24": ({"q": zeros(2, 3, 4, 24)}, "q must have a multiple of 16 up to 256 as last size, got 24"),
        "width large": ({"q": zeros(2, 3, 4, 272)}, "q must have a multiple of 16 up to 256 as last size, got 272"),
        "rotary 24": ({"cos": zeros(2, 3, 24)}, "cos must have a multiple of 16 up to 32 as last size, got 24"),
        "rotary 0": ({"cos": zeros(2, 3, 0)}, "cos must have a multiple of 16 up to 32 as last size, got 0"),
        "rotary large": ({"cos": zeros(2, 3, 48)}, "cos must have a multiple of 16 up to 32 as last size, got 48"),
        "one weight": ({"k_weight": None}, "q_weight and k_weight must come together, got one"),
        "the other weight": ({"q_weight": None}, "q_weight and k_weight must come together, got one"),
        "weighted 48": (
            {"q": zeros(2, 3, 4, 48)},
            "q must have 16 times a power of two as last size with a weight, got 48",
        ),
        "no head": ({"q": zeros(2, 3, 0, 32)}, "q must have at least 1 head, got 0"),
        "no key head": ({"k": zeros(2, 3, 0, 32)}, "k must have at least 1 head, got 0"),
        "q_out": ({"q_out": zeros(2, 3, 3, 32)}, "q_out must have shape [2, 3, 4, 32], got [2, 3, 3, 32]"),
        "k_out": ({"k_out": zeros(2, 2, 3, 32)}, "k_out must have shape [2, 3, 2, 32], got [2, 2, 3, 32]"),
        "k": (
            {"k": zeros(2, 4, 2, 32), "k_out": zeros(2, 4, 2, 32)},
            "k must have shape [2, 3, 2, 32], got [2, 4, 2, 32]",
        ),
        "cos samples": ({"cos": zeros(3, 3, 16)}, "cos must have shape [2, 3, 16], got [3, 3, 16]"),
        "cos of one": ({"cos": zeros(1, 4, 16)}, "cos must have shape [1, 3, 16], got [1, 4, 16]"),
        "sin of one": ({"sin": zeros(1, 3, 16)}, "sin must have shape [2, 3, 16], got [1, 3, 16]"),
        "q as attention takes it": (
            {"q": zeros(2, 4, 3, 32).transpose(1, 2)},
            "q must have strides (T * s, s, D, 1), s a multiple of 8, got (384, 32, 96, 1)",
        ),
        "k features": (
            {"k": zeros(2, 3, 2, 64)[..., ::2]},
            "k must have strides (T * s, s, D, 1), s a multiple of 8, got (384, 128, 64, 2)",
        ),
        "q odd tokens": (
            {"q": zeros(2, 3, 132)[..., :128].view(2, 3, 4, 32)},
            "q must have strides (T * s, s, D, 1), s a multiple of 8, got (396, 132, 32, 1)",
        ),
        "q samples apart": (
            {"q": zeros(2, 6, 4, 32)[:, :3]},
            "q must have strides (T * s, s, D, 1), s a multiple of 8, got (768, 128, 32, 1)",
        ),
    },
}
ERRORS = {op: {**common(op), **OWN[op]} for op in FUSED_OPS}


@pytest.mark.parametrize("op", FUSED_OPS)
def test_the_arguments_without_a_change_are_right(device: torch.device, op: str) -> None:
    for kernel in kernels_of(op).values():
        kernel(**moved(ARGUMENTS[op], device))


@pytest.mark.parametrize("op", FUSED_OPS)
def test_errors(device: torch.device, op: str) -> None:
    check_errors(op, ARGUMENTS[op], ERRORS[op], device)


def all_but_the_first(op: str) -> list[str]:
    """The tensors that must be where the first one is."""
    return [name for name in tensors(op) if name != FIRST[op]]


@pytest.mark.parametrize("op", FUSED_OPS)
def test_two_devices(device: torch.device, op: str) -> None:
    check_devices(op, ARGUMENTS[op], all_but_the_first(op), device)


@pytest.mark.gpu
@pytest.mark.parametrize("place, other", [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("op", FUSED_OPS)
def test_between_cpu_and_cuda(op: str, place: str, other: str) -> None:
    check_devices(op, ARGUMENTS[op], all_but_the_first(op), torch.device(place), other)


@pytest.mark.parametrize("op", FUSED_OPS)
def test_a_failed_call_writes_nothing(device: torch.device, op: str) -> None:
    arguments = moved({**ARGUMENTS[op], "step": 2}, device)
    written = [name for name in tensors(op) if name in ("normed", "hidden") or name.endswith(("out", "sumsq"))]
    for name in written:
        arguments[name].fill_(7)
    with pytest.raises(RuntimeError, match="elements, got"):
        kernels_of(op)["op"](**arguments)
    assert all((arguments[name] == 7).all() for name in written)
