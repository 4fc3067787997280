"""The fused kernels, with the sums they emit, and when they stand aside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

from plop_ext import ops
from plop_ext.collecting.emitter import Emitter
from plop_ext.forwards.defined_in import is_defined_in
from plop_ext.forwards.fast.families import Norm
from plop_ext.forwards.fast.kernel_audit import Audit

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
        and _is_defined_in_torch(nn.Linear.forward)
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
    _run(
        "add_rms_norm_",
        emitter,
        audit,
        normed=_rows(normed),
        hidden=None if hidden is None else _rows(hidden),
        x=_rows(x),
        residual=None if residual is None else _rows(residual),
        weight=norm.weight,
        eps=norm.eps,
        inner_weight=None if inner is None else inner.weight,
        inner_eps=0.0 if inner is None else inner.eps,
        unit_offset=unit_offset,
        bias=bias,
        x_sumsq=x_sums,
        normed_sumsq=normed_sums,
    )
    emitter.register_input(normed, normed_sums)
    return x if hidden is None else hidden, normed


def gated_activation(gate: Tensor, up: Tensor, activation: str, emitter: Emitter, audit: Audit | None) -> Tensor:
    """activation(gate) * up, [..., I]; rows may lie further apart than I."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate_sums, gate_bias = emitter.output(gate)
    up_sums, up_bias = emitter.output(up)
    out_sums = emitter.input()
    _run(
        "gated_activation_",
        emitter,
        audit,
        out_scale=_gelu_scale if activation == "gelu_tanh" else None,
        out=_rows(out),
        gate=_rows(gate),
        up=_rows(up),
        activation=activation,
        gate_bias=gate_bias,
        up_bias=up_bias,
        gate_sumsq=gate_sums,
        up_sumsq=up_sums,
        out_sumsq=out_sums,
    )
    emitter.register_input(out, out_sums)
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
    _run(
        "gated_projection_",
        emitter,
        audit,
        out_scale=_projected_gelu_scale if activation == "gelu_tanh" else None,
        out=_rows(out),
        x=_rows(x),
        gate_weight=gate_weight,
        up_weight=up_weight,
        activation=activation,
        gate_sumsq=gate_sums,
        up_sumsq=up_sums,
        out_sumsq=out_sums,
    )
    emitter.register_input(out, out_sums)
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
    _run(
        "rotary_",
        emitter,
        audit,
        q_out=q_out,
        k_out=k_out,
        q=q,
        k=k,
        cos=cos.contiguous(),
        sin=sin.contiguous(),
        q_weight=None if q_norm is None else q_norm.weight,
        k_weight=None if k_norm is None else k_norm.weight,
        eps=0.0 if q_norm is None else q_norm.eps,
        unit_offset=unit_offset,
        q_bias=q_bias,
        k_bias=k_bias,
        q_sumsq=q_sums,
        k_sumsq=k_sums,
    )
    return q_out, k_out


def _run(
    op: str, emitter: Emitter, audit: Audit | None, out_scale: Callable[..., Tensor] | None = None, **arguments: Any
) -> None:
    """Call an op on the rows that `emitter` wants, and have the call audited."""
    arguments |= {"step": emitter.step, "phase": emitter.phase}
    getattr(ops, op)(**arguments)
    if audit is not None:
        audit.compare(op, arguments, out_scale)


def _gelu_scale(gate: Tensor, up: Tensor, **others: Any) -> Tensor:
    """Return the product that GELU's errors are relative to: 1 + tanh cancels far below zero, and leaves rounding."""
    return gate.float() * up.float()


def _projected_gelu_scale(x: Tensor, gate_weight: Tensor, up_weight: Tensor, **others: Any) -> Tensor:
    return _gelu_scale(functional.linear(x, gate_weight), functional.linear(x, up_weight))


@functools.cache
def _is_defined_in_torch(function: Any) -> bool:
    return is_defined_in(function, "torch")


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
