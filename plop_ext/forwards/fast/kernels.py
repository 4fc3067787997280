"""The fused kernels, with the sums they emit, and when they stand aside."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

from plop_ext import ops
from plop_ext.collecting.emitter import Emitter
from plop_ext.forwards.defined_in import is_code_of
from plop_ext.forwards.fast.families import Norm
from plop_ext.forwards.fast.kernel_audit import Audit

# GELU's 1 + tanh cancels far below zero: what is left of such a row may be rounding.
_GELU_SCALES = {
    0: lambda args: args[1].float() * args[2].float(),
    8: lambda args: (args[1].float() * args[2].float()).square().sum(dim=1),
}


_PROJECTED_GELU_SCALES = {
    0: lambda args: _projected(args),
    7: lambda args: _projected(args).square().sum(dim=1),
}
# From so many tokens on `gated_projection` is no slower than cuBLAS' products and `gated_activation` in any shape
# measured; cuBLAS has smaller tiles for fewer.
_PROJECTED_ROWS = 512


def runs_fused(module: nn.Module, x: Tensor) -> bool:
    """Whether `module` may use the kernels on `x`: they record no gradient, drop nothing and know no autocast.

    In inference mode a tensor does not tell whether it was modified since its sums were taken.
    """
    return not (
        module.training
        or torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled(x.device.type)
        or torch.compiler.is_compiling()
    )


def takes(x: Tensor, *others: Tensor) -> bool:
    """Whether a kernel reads `x` row by row: one of its types, contiguous, aligned, and all others alike."""
    return (
        x.dtype in ops.FUSED_FLOATS
        and x.is_contiguous()
        and ops.is_aligned(x)
        and all(other.dtype == x.dtype and other.device == x.device for other in others)
    )


def takes_columns(gate: Tensor, up: Tensor, like: Tensor) -> bool:
    """Whether `gated_activation` reads gate and up as they lie in memory, and `like`'s type is theirs."""
    return all(
        x.dtype == like.dtype and x.stride(-1) == 1 and x.stride(-2) % 8 == 0 and ops.is_aligned(x) and _folds(x)
        for x in (gate, up)
    )


def is_plain(linear: Any) -> bool:
    """Whether a layer is an nn.Linear without bias, and has nothing but forward hooks."""
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and type(linear.weight) is nn.Parameter  # a quantized or sharded one is of another class
        and not linear._forward_pre_hooks
        and "forward" not in vars(linear)
    )


def takes_weights(x: Tensor, linears: Sequence[Any]) -> bool:
    """Whether `gated_projection` may stand for `linears` on `x` [..., K]: plain, without bias, and of many tokens."""
    return (
        x.dtype in ops.PROJECTION_FLOATS
        and x.shape[:-1].numel() >= _PROJECTED_ROWS
        and ops.has_gated_projection(x.device)
        and not torch_module._global_forward_hooks
        and not torch_module._global_forward_pre_hooks
        and _is_torchs(nn.Linear.forward)
        and all(is_plain(linear) and _reads(linear, x) for linear in linears)
        and linears[0].weight.shape == linears[-1].weight.shape
        and len(linears[0].weight) % (8 * (3 - len(linears))) == 0
    )


def takes_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotary` reads q and k [B, T, heads, D] as they lie in memory."""
    rotary_dim, width = cos.shape[-1], q.shape[-1]
    return (
        q.dtype in ops.FUSED_FLOATS
        and all(x.dtype == q.dtype and x.device == q.device for x in (k, cos, sin))
        and cos.dim() == 3
        and cos.shape == sin.shape
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1] == q.shape[1]
        and rotary_dim % 16 == 0
        and (width - rotary_dim) % 16 == 0
        and all(ops.is_aligned(x) or not x.is_contiguous() for x in (cos, sin))  # else a copy is made
        and all(_tokens_apart(x) for x in (q, k))
    )


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    inner: Norm | None,
    unit_offset: bool,
    emitter: Emitter,
    audit: Audit | None,
) -> tuple[Tensor, Tensor]:
    """(residual + x, its norm), or with `inner` residual + inner(x); without a residual x itself. All [B, T, K]."""
    normed = torch.empty_like(x)
    hidden = None if residual is None else torch.empty_like(x)
    x_sums, bias = emitter.output(x)
    normed_sums = emitter.input()
    args = (
        _rows(normed),
        None if hidden is None else _rows(hidden),
        _rows(x),
        None if residual is None else _rows(residual),
        norm.weight,
        norm.eps,
        None if inner is None else inner.weight,
        0.0 if inner is None else inner.eps,
        unit_offset,
        bias,
        x_sums,
        normed_sums,
        emitter.step,
        emitter.phase,
    )
    ops.add_rms_norm_(*args)
    if audit is not None:
        audit.compare(ops.add_rms_norm_pytorch, args, rows=(0, 1, 2, 3), written=(0, 1), sums=(10, 11))
    emitter.know(normed, normed_sums)
    return x if hidden is None else hidden, normed


def gated_activation(gate: Tensor, up: Tensor, activation: str, emitter: Emitter, audit: Audit | None) -> Tensor:
    """activation(gate) * up, [..., I]; rows may lie further apart than I."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate_sums, gate_bias = emitter.output(gate)
    up_sums, up_bias = emitter.output(up)
    out_sums = emitter.input()
    args = (
        _rows(out),
        _rows(gate),
        _rows(up),
        activation,
        gate_bias,
        up_bias,
        gate_sums,
        up_sums,
        out_sums,
        emitter.step,
        emitter.phase,
    )
    ops.gated_activation_(*args)
    if audit is not None:
        audit.compare(
            ops.gated_activation_pytorch,
            args,
            rows=(0, 1, 2),
            written=(0,),
            sums=(6, 7, 8),
            scales=_GELU_SCALES if activation == "gelu_tanh" else None,
        )
    emitter.know(out, out_sums)
    return out


def gated_projection(
    x: Tensor, linears: Sequence[Any], activation: str, emitter: Emitter, audit: Audit | None
) -> Tensor:
    """activation(gate) * up, [..., I], of what `linears`, two or one for both, would make of x [..., K]."""
    weights = [linear.weight for linear in linears]
    gate_weight, up_weight = weights if len(weights) == 2 else weights[0].chunk(2)
    out = torch.empty(*x.shape[:-1], len(gate_weight), dtype=x.dtype, device=x.device)
    gate_sums, up_sums = emitter.projected(linears, x)
    out_sums = emitter.input()
    args = (
        _rows(out),
        _rows(x),
        gate_weight,
        up_weight,
        activation,
        gate_sums,
        up_sums,
        out_sums,
        emitter.step,
        emitter.phase,
    )
    ops.gated_projection_(*args)
    if audit is not None:
        audit.compare(
            ops.gated_projection_pytorch,
            args,
            rows=(0, 1),
            written=(0,),
            sums=(5, 6, 7),
            scales=_PROJECTED_GELU_SCALES if activation == "gelu_tanh" else None,
        )
    emitter.know(out, out_sums)
    return out


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Norm, Norm] | None,
    unit_offset: bool,
    emitter: Emitter,
    audit: Audit | None,
) -> tuple[Tensor, Tensor]:
    """q and k [B, T, heads, D], normed per head and rotated."""
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_sums, q_bias = emitter.output(q)
    k_sums, k_bias = emitter.output(k)
    q_norm, k_norm = norms or (None, None)
    args = (
        q_out,
        k_out,
        q,
        k,
        cos.contiguous(),
        sin.contiguous(),
        None if q_norm is None else q_norm.weight,
        None if k_norm is None else k_norm.weight,
        0.0 if q_norm is None else q_norm.eps,
        unit_offset,
        q_bias,
        k_bias,
        q_sums,
        k_sums,
        emitter.step,
        emitter.phase,
    )
    ops.rotary_(*args)
    if audit is not None:
        audit.compare(ops.rotary_pytorch, args, rows=(0, 1, 2, 3, 4, 5), written=(0, 1), sums=(12, 13))
    return q_out, k_out


def _projected(args: Sequence[Any]) -> Tensor:
    """gate * up of the arguments of `gated_projection_`."""
    gate, up = (functional.linear(args[1], weight) for weight in args[2:4])
    return gate.float() * up.float()


@functools.cache
def _is_torchs(function: Any) -> bool:
    return is_code_of(function, "torch")


def _reads(linear: Any, x: Tensor) -> bool:
    """Whether the kernel reads a layer's weight beside `x`."""
    weight = linear.weight
    return (
        weight.dtype == x.dtype
        and weight.device == x.device
        and weight.shape[1] == x.shape[-1]
        and len(weight) > 0
        and weight.is_contiguous()
        and ops.is_aligned(weight)
    )


def _tokens_apart(x: Tensor) -> bool:
    """Whether the heads of a token lie one after the other, and tokens at one distance."""
    _, tokens, _, width = x.shape
    between, token, head, element = x.stride()
    apart = head == width and element == 1 and token % 8 == 0 and ops.is_aligned(x)
    return apart and (x.shape[0] == 1 or between == tokens * token)


def _folds(x: Tensor) -> bool:
    """Whether [..., T, I] is [R, I] without a copy."""
    strides = zip(x.shape[:-2], x.stride()[:-2], x.shape[1:-1], x.stride()[1:-1], strict=True)
    return all(size == 1 or stride == inner * apart for size, stride, inner, apart in strides)


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])
