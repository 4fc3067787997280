"""Runs the fused ops into fresh outputs, and makes their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from plop_ext import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FUSED_OPS = ("add_rms_norm_", "gated_activation_", "rotary_")
# "op" is the native kernel where there is one (`test_native_kernels_serve_the_fused_ops`), "pytorch" never is.
KERNELS = ["op", "pytorch"]
# Rows of one warp and of several, with and without a last warp or a last round that is not full.
WIDTHS = [8, 24, 64, 160, 2312, 4096, 5120, 11016, 14336, 16384]


class Norms(NamedTuple):
    normed: Tensor
    hidden: Tensor
    x_sumsq: Tensor
    normed_sumsq: Tensor


class Gated(NamedTuple):
    out: Tensor
    gate_sumsq: Tensor
    up_sumsq: Tensor
    out_sumsq: Tensor


class Rotated(NamedTuple):
    q: Tensor
    k: Tensor
    q_sumsq: Tensor
    k_sumsq: Tensor


def kernel_of(op: str, kernel: str) -> Any:
    return getattr(ops, op if kernel == "op" else f"{op}pytorch")


def skip_without_native(op: str, device: torch.device) -> None:
    """For what only native kernels promise; on CUDA the tests are skipped without them, or fail."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"plop_ext::{op}", device.type.upper()):
        pytest.skip(f"{op} runs on its PyTorch kernel, whose bits depend on vector tails and reduction shapes")


def blank(shape: Any, like: Tensor) -> Tensor:
    """An output that starts as NaN, so that an element the op skips shows."""
    return torch.full(tuple(shape), torch.nan, dtype=like.dtype, device=like.device)


def blank_sums(rows: int, like: Tensor, step: int, phase: int) -> Tensor:
    return torch.full((ops.rows_read(rows, step, phase),), torch.nan, device=like.device)


def add_rms_norm(
    kernel: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, **given: Any
) -> Norms:
    """All four outputs; `given` holds the arguments after `eps` by name."""
    place = given.get("step", 1), given.get("phase", 0)
    result = Norms(blank(x.shape, x), blank(x.shape, x), blank_sums(len(x), x, *place), blank_sums(len(x), x, *place))
    sums = {"x_sumsq": result.x_sumsq, "normed_sumsq": result.normed_sumsq}
    run = kernel_of("add_rms_norm_", kernel)
    assert run(result.normed, result.hidden, x, residual, weight, eps, **{**sums, **given}) is None
    return result


def gated_activation(kernel: str, gate: Tensor, up: Tensor, activation: str = "silu", **given: Any) -> Gated:
    """All four outputs; `given` holds the arguments after `activation` by name."""
    place = given.get("step", 1), given.get("phase", 0)
    result = Gated(blank(gate.shape, gate), *(blank_sums(len(gate), gate, *place) for _ in range(3)))
    sums = {"gate_sumsq": result.gate_sumsq, "up_sumsq": result.up_sumsq, "out_sumsq": result.out_sumsq}
    assert kernel_of("gated_activation_", kernel)(result.out, gate, up, activation, **{**sums, **given}) is None
    return result


def rotary(kernel: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **given: Any) -> Rotated:
    """All four outputs; `given` holds the arguments after `sin` by name."""
    place = given.get("step", 1), given.get("phase", 0)
    tokens = q.shape[0] * q.shape[1]
    result = Rotated(blank(q.shape, q), blank(k.shape, k), *(blank_sums(tokens, q, *place) for _ in range(2)))
    sums = {"q_sumsq": result.q_sumsq, "k_sumsq": result.k_sumsq}
    assert kernel_of("rotary_", kernel)(result.q, result.k, q, k, cos, sin, **{**sums, **given}) is None
    return result


def randn(*shape: int, like: tuple[torch.device, torch.dtype], scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """The same values on every device."""
    device, dtype = like
    return (torch.randn(shape) * scale + shift).to(device, dtype)


def tables(batch: int, length: int, width: int, like: tuple[torch.device, torch.dtype]) -> tuple[Tensor, Tensor]:
    """cos and sin [batch, length, width] of positions that differ between samples, as models make them."""
    device, dtype = like
    positions = torch.arange(length) + 100 * torch.arange(batch)[:, None]
    angles = positions[..., None] / 10000 ** (torch.arange(0, width, 2) / width)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def heads_of_fused(
    batch: int, length: int, q_heads: int, k_heads: int, width: int, like: tuple[torch.device, torch.dtype]
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D] and k [B, T, Hk, D] that lie in one packed projection, as Phi3 reads them."""
    qkv = randn(batch, length, (q_heads + 2 * k_heads) * width, like=like)
    q, k, _ = qkv.split([q_heads * width, k_heads * width, k_heads * width], dim=-1)
    return q.view(batch, length, q_heads, width), k.view(batch, length, k_heads, width)


def runs(device: torch.device, dtype: torch.dtype, rows: int = 12) -> dict[str, tuple[Callable[..., Any], dict]]:
    """Every op with all of its arguments: how to run it, and its tensors with one entry per row or token first."""
    like = device, dtype
    width = 160
    weight, inner, bias = (randn(width, like=like, shift=shift) for shift in (1, 0.5, 0))
    q_weight, k_weight = randn(32, like=like, shift=1), randn(32, like=like)
    q_bias, k_bias = randn(96, like=like), randn(64, like=like)
    cos, sin = (table[0] for table in tables(1, rows, 32, like))

    def norms(kernel: str, x: Tensor, residual: Tensor, **given: Any) -> Any:
        inner_norm = {"inner_weight": inner, "inner_eps": 1e-4}
        return add_rms_norm(kernel, x, residual, weight, 1e-5, **{"bias": bias, **inner_norm, **given})

    def gated(kernel: str, gate: Tensor, up: Tensor, **given: Any) -> Any:
        return gated_activation(kernel, gate, up, "gelu_tanh", **{"gate_bias": bias, "up_bias": inner, **given})

    def turned(kernel: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **given: Any) -> Any:
        weights = {"q_weight": q_weight, "k_weight": k_weight, "eps": 1e-5, "q_bias": q_bias, "k_bias": k_bias}
        result = rotary(kernel, q[None], k[None], cos[None], sin[None], **{**weights, **given})
        return result._replace(q=result.q[0], k=result.k[0])

    x, residual = randn(rows, width, like=like), randn(rows, width, like=like)
    q, k = randn(rows, 3, 32, like=like), randn(rows, 2, 32, like=like)
    return {
        "add_rms_norm_": (norms, {"x": x, "residual": residual}),
        "gated_activation_": (gated, {"gate": residual, "up": x}),
        "rotary_": (turned, {"q": q, "k": k, "cos": cos, "sin": sin}),
    }
