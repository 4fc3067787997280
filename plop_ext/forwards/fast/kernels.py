"""The calls of the fused kernels with the sums that they emit, and the conditions for their use."""

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

# Smallest number of tokens at which `gated_projection` is no slower than cuBLAS' products and `gated_activation` in
# every shape measured. For fewer tokens, cuBLAS has smaller tiles.
_PROJECTED_ROWS = 512


def runs_fused(module: nn.Module, x: Tensor) -> bool:
    """Return whether `module` may use the kernels on `x`: without gradients, dropout, autocast and inference mode.

    A tensor of inference mode has no version, so a modification after its sums were computed could not be detected.
    """
    return not (
        module.training
        or torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled(x.device.type)
        or torch.compiler.is_compiling()
    )


def takes(x: Tensor, *others: Tensor) -> bool:
    """Return whether kernels support `x`: its type, contiguous, aligned, and `others` of its type and device."""
    return (
        x.dtype in ops.FUSED_FLOATS
        and x.is_contiguous()
        and ops.is_aligned(x)
        and all(other.dtype == x.dtype and other.device == x.device for other in others)
    )


def takes_columns(gate: Tensor, up: Tensor, like: Tensor) -> bool:
    """Return whether `gated_activation` supports the layout of gate and up, and their type is that of `like`."""
    return all(
        x.dtype == like.dtype and x.stride(-1) == 1 and x.stride(-2) % 8 == 0 and ops.is_aligned(x) and _folds(x)
        for x in (gate, up)
    )


def is_plain(linear: Any) -> bool:
    """Return whether a layer is an unmodified nn.Linear without bias; it may have forward hooks."""
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and type(linear.weight) is nn.Parameter  # a quantized or sharded one is of another class
        and not linear._forward_pre_hooks
        and "forward" not in vars(linear)
    )


def takes_weights(x: Tensor, linears: Sequence[Any]) -> bool:
    """Return whether `gated_projection` may replace `linears` on `x` [..., K]: plain, and for many tokens."""
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
    """Return whether `rotary` supports the layout of q and k [B, T, heads, D]."""
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
    """Return residual + x and its norm; with `inner`, residual + inner(x); without a residual, x. All [B, T, K]."""
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
    """Return activation(gate) * up, [..., I]; rows may be further apart than I."""
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
    """Return activation(gate) * up, [..., I], for gate and up from `linears` (two, or one for both) of x [..., K]."""
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
    """Return q and k [B, T, heads, D], normed per head and rotated."""
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
    """Call an op with the step and phase of `emitter`, and audit the call."""
    arguments |= {"step": emitter.step, "phase": emitter.phase}
    getattr(ops, op)(**arguments)
    if audit is not None:
        audit.compare(op, arguments, out_scale)


def _gelu_scale(gate: Tensor, up: Tensor, **others: Any) -> Tensor:
    """Return the product to which GELU's errors are relative: far below zero, 1 + tanh cancels to rounding errors."""
    return gate.float() * up.float()


def _projected_gelu_scale(x: Tensor, gate_weight: Tensor, up_weight: Tensor, **others: Any) -> Tensor:
    return _gelu_scale(functional.linear(x, gate_weight), functional.linear(x, up_weight))


@functools.cache
def _is_defined_in_torch(function: Any) -> bool:
    return is_defined_in(function, "torch")


def _reads(linear: Any, x: Tensor) -> bool:
    """Return whether the kernel supports a layer's weight with `x`."""
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
    """Return whether the heads of a token are adjacent, and tokens equally spaced."""
    _, tokens, _, width = x.shape
    between, token, head, element = x.stride()
    apart = head == width and element == 1 and token % 8 == 0 and ops.is_aligned(x)
    return apart and (x.shape[0] == 1 or between == tokens * token)


def _folds(x: Tensor) -> bool:
    """Return whether [..., T, I] can be viewed as [R, I] without a copy."""
    strides = zip(x.shape[:-2], x.stride()[:-2], x.shape[1:-1], x.stride()[1:-1], strict=True)
    return all(size == 1 or stride == inner * apart for size, stride, inner, apart in strides)


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])
