"""The fused ops against the float64 oracle, also for numbers that are not finite and for rows that are not read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plop_ext import ops, reference
from tests.support.fused_ops import (
    DTYPES,
    FUSED_OPS,
    KERNELS,
    WIDTHS,
    add_rms_norm,
    gated_activation,
    heads_of_fused,
    randn,
    rotary,
    runs,
    tables,
)
from tests.support.op_results import SUMS, roundoff, sums_are, within

# Relative error of what the kernels compute in float32 before they round: the root of a sum, exp, tanh. A sum of n
# squares in one accumulator is off by about 2^-24 * sqrt(n) / 2, and its root by half of that; n is 2048 at most.
FLOAT32 = 1e-6
# Widths of heads that fill a warp and that do not, all or part of them rotated.
ROTATED = [(16, 16), (32, 32), (48, 48), (64, 32), (80, 80), (96, 96), (112, 48), (128, 128), (144, 144), (160, 128)]
ROTATED += [(176, 176), (208, 208), (240, 240), (256, 64), (256, 256)]
STEPS = [(1, 0), (2, 1), (3, 2), (50, 7)]


def check_norm(
    kernel: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5, **given: Any
) -> None:
    """hidden against the oracle, then normed against the oracle's norm of the rounded hidden: few roundings each."""
    result = add_rms_norm(kernel, x, residual, weight, eps, **given)
    unit, offset = roundoff(x.dtype), given.get("unit_offset", False)
    norm_error = FLOAT32 + (1 if offset else 2) * unit
    inner = given.get("inner_weight")
    y, y_error = x.cpu().double(), 0.0
    if inner is not None:
        y, y_error = reference.rms_norm(x, inner, given["inner_eps"], offset), norm_error
    hidden = y if residual is None else residual.cpu().double() + y
    add_error = 0.0 if residual is None else unit
    within(result.hidden, hidden, add_error * (1 + unit) * hidden.abs() + 1.01 * y_error * y.abs())
    normed = reference.rms_norm(result.hidden, weight, eps, offset)
    within(result.normed, normed, 1.01 * norm_error * normed.abs())
    step, phase = given.get("step", 1), given.get("phase", 0)
    sums_are(result.x_sumsq, x, given.get("bias"), step, phase)
    sums_are(result.normed_sumsq, result.normed, None, step, phase)


def check_gated(kernel: str, gate: Tensor, up: Tensor, activation: str, **given: Any) -> None:
    result = gated_activation(kernel, gate, up, activation, **given)
    expected = reference.gated_activation(gate, up, activation)
    info = torch.finfo(gate.dtype)
    bound = (FLOAT32 + 2 * roundoff(gate.dtype)) * 1.01 * expected.abs()
    bound += info.smallest_normal * info.eps * up.cpu().double().abs()  # where the activation underflows
    if activation == "silu":  # below -88.7 exp(-gate) overflows, and PyTorch's quotient is zero
        bound += 3e-37 * up.cpu().double().abs()
    if activation == "gelu_tanh":  # 1 + tanh cancels where gate is far below zero
        bound += 2**-23 * (gate.cpu().double() * up.cpu().double()).abs()
    within(result.out, expected, bound)
    step, phase = given.get("step", 1), given.get("phase", 0)
    sums_are(result.gate_sumsq, gate, given.get("gate_bias"), step, phase)
    sums_are(result.up_sumsq, up, given.get("up_bias"), step, phase)
    sums_are(result.out_sumsq, result.out, None, step, phase)


def check_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **given: Any) -> None:
    """All kernels against one oracle, which takes most of the time."""
    results = {kernel: rotary(kernel, q, k, cos, sin, **given) for kernel in KERNELS}
    eps, offset = given.get("eps", 0.0), given.get("unit_offset", False)
    step, phase = given.get("step", 1), given.get("phase", 0)
    half = cos.shape[-1] // 2
    opposed = torch.cat((-sin[..., :half].abs(), sin[..., half:].abs()), dim=-1)
    for name, x in (("q", q), ("k", k)):
        weight = given.get(f"{name}_weight")
        normed = x.cpu().double() if weight is None else reference.rms_norm(x, weight, eps, offset)
        roundings = 2 + (0 if weight is None else 1 if offset else 2)
        magnitude = reference.rotary(normed.abs(), cos.abs(), opposed)  # |n cos| + |n sin|
        bound = (FLOAT32 + roundings * roundoff(x.dtype)) * 1.01 * magnitude
        expected = reference.rotary(normed, cos, sin)
        for kernel, result in results.items():
            within(getattr(result, name), expected, bound, f"{name} of {kernel}")
            sums = getattr(result, f"{name}_sumsq")
            sums_are(sums, x.flatten(0, 1), given.get(f"{name}_bias"), step, phase)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_equal_the_oracle(device: torch.device, kernel: str, dtype: torch.dtype, width: int) -> None:
    like = device, dtype
    x, residual = randn(5, width, like=like), randn(5, width, like=like, scale=3)
    weight, inner = randn(width, like=like, shift=1), randn(width, like=like, scale=0.3)
    check_norm(kernel, x, residual, weight)
    check_norm(kernel, x, None, weight, bias=inner)
    check_norm(kernel, x[:1], residual[:1], inner, unit_offset=True)
    check_norm(kernel, x, residual, weight, inner_weight=inner, inner_eps=1e-3, bias=weight)
    check_norm(kernel, x, residual, inner, inner_weight=inner, inner_eps=1e-3, unit_offset=True)
    check_norm(kernel, x, None, weight, inner_weight=inner, inner_eps=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_activations_equal_the_oracle(
    device: torch.device, kernel: str, activation: str, dtype: torch.dtype, width: int
) -> None:
    like = device, dtype
    gate, up = randn(5, 2 * width, like=like, scale=3).chunk(2, dim=1)
    bias = randn(width, like=like)
    check_gated(kernel, gate, up, activation)
    check_gated(kernel, gate.contiguous(), up, activation, gate_bias=bias)
    check_gated(kernel, gate, up.contiguous(), activation, up_bias=bias)
    check_gated(kernel, gate[2:3], up[2:3], activation, gate_bias=bias, up_bias=2 * bias)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations_of_every_magnitude(device: torch.device, kernel: str, activation: str) -> None:
    for dtype in DTYPES:
        gate = torch.linspace(-110, 110, 2**14).view(-1, 8).T.contiguous().to(device, dtype)
        check_gated(kernel, gate, torch.ones_like(gate), activation)
        far = torch.tensor([[-60000.0, -500, 500, 60000] * 2], device=device, dtype=dtype)
        result = gated_activation(kernel, far, torch.ones_like(far), activation)
        assert torch.equal(result.out, far.clamp(min=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width, turned", ROTATED)
@pytest.mark.parametrize("q_heads, k_heads", [(1, 1), (3, 2), (6, 2), (33, 5)])
def test_rotations_equal_the_oracle(
    device: torch.device, dtype: torch.dtype, width: int, turned: int, q_heads: int, k_heads: int
) -> None:
    like = device, dtype
    q, k = heads_of_fused(2, 3, q_heads, k_heads, width, like)
    q_bias, k_bias = randn(q_heads * width, like=like), randn(k_heads * width, like=like)
    for cos, sin in (tables(2, 3, turned, like), tables(1, 3, turned, like)):
        check_rotary(q, k, cos, sin)
        check_rotary(q.contiguous(), k, cos, sin, q_bias=q_bias, k_bias=k_bias)
        if width // 16 & (width // 16 - 1) == 0:  # a power of two
            weights = {"q_weight": randn(width, like=like, shift=1), "k_weight": randn(width, like=like)}
            check_rotary(q, k, cos, sin, **weights, eps=1e-5, k_bias=k_bias)
            check_rotary(q, k, cos, sin, **weights, eps=1e-5, unit_offset=True)
    check_rotary(q[1:, :1], k[1:, :1], *tables(1, 1, turned, like), q_bias=q_bias)
    check_rotary(q[:, :1].contiguous(), k[:, :1].contiguous(), *tables(2, 1, turned, like))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", FUSED_OPS)
@pytest.mark.parametrize("step, phase", STEPS)
def test_step_and_phase_choose_sums_and_change_no_output(
    device: torch.device, kernel: str, op: str, step: int, phase: int
) -> None:
    run, rows = runs(device, torch.bfloat16)[op]
    whole, sampled = run(kernel, **rows), run(kernel, **rows, step=step, phase=phase)
    for name, tensor in whole._asdict().items():
        expected = tensor[phase::step] if name.endswith("sumsq") else tensor
        if kernel == "op":
            assert torch.equal(getattr(sampled, name), expected), name
        else:
            torch.testing.assert_close(getattr(sampled, name), expected, rtol=SUMS, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", FUSED_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_stay_in_their_row(
    device: torch.device, kernel: str, op: str, dtype: torch.dtype, value: float
) -> None:
    run, rows = runs(device, dtype)[op]
    clean = run(kernel, **rows)
    kept = [row for row in range(12) if row != 5]
    for argument in list(rows)[:2]:
        dirty = {name: tensor.clone() for name, tensor in rows.items()}
        dirty[argument][5].view(-1)[-3] = value
        result = run(kernel, **dirty)
        spoilt = 0
        for name, tensor in clean._asdict().items():
            assert torch.equal(getattr(result, name)[kept], tensor[kept]), name
            spoilt += int(not getattr(result, name)[5].isfinite().all())
        assert spoilt >= 2  # an output and a sum
        own = {"x": "x_sumsq", "residual": "normed_sumsq"}.get(argument, f"{argument}_sumsq")
        assert not getattr(result, own)[5].isfinite()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_stay_zeros(device: torch.device, kernel: str, dtype: torch.dtype) -> None:
    """Padding: its sums are exactly zero, which is how the scores know it."""
    like = device, dtype
    zeros, weight = torch.zeros(2, 64, device=device, dtype=dtype), randn(64, like=like)
    for given in ({}, {"inner_weight": weight, "inner_eps": 1e-6}):
        for result in add_rms_norm(kernel, zeros, zeros, weight, **given):
            assert (result == 0).all()
    for activation in ops.ACTIVATIONS:
        for result in gated_activation(kernel, zeros, zeros, activation):
            assert (result == 0).all()
    heads = zeros.view(1, 2, 2, 32)
    for given in ({}, {"q_weight": weight[:32], "k_weight": weight[32:], "eps": 1e-6}):
        for result in rotary(kernel, heads, heads, *tables(1, 2, 32, like), **given):
            assert (result == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(device: torch.device, kernel: str, dtype: torch.dtype) -> None:
    like = device, dtype
    nothing, weight = randn(0, 64, like=like), randn(64, like=like)
    assert all(not result.numel() for result in add_rms_norm(kernel, nothing, nothing, weight, bias=weight))
    assert all(not result.numel() for result in gated_activation(kernel, nothing, nothing, step=3, phase=2))
    for batch, length in ((0, 3), (2, 0)):
        heads = randn(batch, length, 2, 32, like=like)
        for samples in {1, batch}:
            assert all(not r.numel() for r in rotary(kernel, heads, heads, *tables(samples, length, 32, like)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_of_half_precision_leave_its_range(device: torch.device, kernel: str) -> None:
    like = device, torch.float16
    x, weight = randn(3, 4096, like=like, scale=3000), randn(4096, like=like, scale=3000)
    check_norm(kernel, x, None, weight)
    check_gated(kernel, x / 100, x / 100, "silu")
    assert add_rms_norm(kernel, x, None, weight).normed_sumsq.min() > 1e9


@pytest.mark.parametrize("op", FUSED_OPS)
def test_the_pytorch_kernel_equals_the_native_one(device: torch.device, op: str) -> None:
    run, rows = runs(device, torch.float32)[op]
    native, pytorch = run("op", **rows), run("pytorch", **rows)
    for name, tensor in native._asdict().items():
        torch.testing.assert_close(getattr(pytorch, name), tensor, rtol=1e-5, atol=1e-6)
