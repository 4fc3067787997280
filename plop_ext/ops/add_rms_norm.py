"""`add_rms_norm_`: residual add and RMSNorm of a block, with the sums of squares of its input and output."""

from __future__ import annotations

import torch
from torch import Tensor

from plop_ext.ops._schema import (
    NAMESPACE,
    VECTOR,
    check,
    check_aligned,
    check_contiguous,
    check_elements,
    check_fused,
    check_rows,
    check_shape,
    check_step,
    given,
    register_fake,
)
from plop_ext.ops.row_sumsq import write_sumsq

MAX_NORM_FEATURES = 16384

torch.library.define(
    f"{NAMESPACE}::add_rms_norm_",
    "(Tensor(a!) normed, Tensor(b!)? hidden, Tensor x, Tensor? residual, Tensor weight, float eps, "
    "Tensor? inner_weight=None, float inner_eps=0., bool unit_offset=False, Tensor? bias=None, "
    "Tensor(c!)? x_sumsq=None, Tensor(d!)? normed_sumsq=None, int step=1, int phase=0) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def add_rms_norm_(
    normed: Tensor,
    hidden: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    inner_weight: Tensor | None = None,
    inner_eps: float = 0.0,
    unit_offset: bool = False,
    bias: Tensor | None = None,
    x_sumsq: Tensor | None = None,
    normed_sumsq: Tensor | None = None,
    step: int = 1,
    phase: int = 0,
) -> None:
    r"""Add a block's output to the residual stream and normalize the sum, with both sums of squares.

    \(h = residual + y\) and \(normed = \mathrm{rms}(h) \cdot w\), where \(y\) is \(x\), or with an inner weight
    \(\mathrm{rms}(x) \cdot w_{inner}\) (Gemma norms a block's output before it adds it), and
    \(\mathrm{rms}(v)_k = v_k / \sqrt{\frac{1}{K} \sum_j v_j^2 + \epsilon}\). The same pass emits the sums of squares
    of the output of the projection before the norm, \(\sum_k (x_{rk} - b_k)^2\), and of the input of the projections
    after it, \(\sum_k normed_{rk}^2\).

    The kernels round where transformers' modules do: y, h and normed are rounded to `x`'s dtype, and everything
    between them is float32. A plain norm is also rounded before its weight is applied; a norm with `unit_offset` is
    not. Sums accumulate in float32 over the stored values. The PyTorch kernel is bitwise identical to the modules. The
    native kernels add in another order, which changes the last bit of a few elements; the result of a row does not
    depend on other rows.

    Args:
        normed: [R, K], written: the input of the projections that follow.
        hidden: [R, K], written: the residual stream h; None omits it.
        x: [R, K] float32, float16 or bfloat16, K a multiple of 8, at most 16384: the output of the projection before.
        residual: [R, K]; None adds nothing.
        weight: [K], weight of the norm.
        eps: Epsilon of the norm.
        inner_weight: [K], weight of a norm of x before the add; None for a model without one.
        inner_eps: Epsilon of the inner norm.
        unit_offset: The stored weights are the factors minus 1 (Gemma).
        bias: [K], bias of the projection, which `x_sumsq` excludes.
        x_sumsq: [N] float32, written, where N = `rows_read(R, step, phase)`; None omits it.
        normed_sumsq: [N] float32, written; None omits it.
        step: Write the sums of every `step`-th row only; normed and hidden are always whole.
        phase: The first row whose sums are written, in [0, step).

    All tensors but the sums share `x`'s dtype, are contiguous and start at a multiple of 8 elements of their storage.

    Raises:
        RuntimeError: If an argument has the wrong device, dtype, rank, size or layout; the message names it.
    """
    torch.ops.plop_ext.add_rms_norm_.default(
        normed,
        hidden,
        x,
        residual,
        weight,
        eps,
        inner_weight,
        inner_eps,
        unit_offset,
        bias,
        x_sumsq,
        normed_sumsq,
        step,
        phase,
    )


@register_fake("add_rms_norm_")
def add_rms_norm_fake(
    normed: Tensor,
    hidden: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    inner_weight: Tensor | None = None,
    inner_eps: float = 0.0,
    unit_offset: bool = False,
    bias: Tensor | None = None,
    x_sumsq: Tensor | None = None,
    normed_sumsq: Tensor | None = None,
    step: int = 1,
    phase: int = 0,
) -> None:
    op = "add_rms_norm_"
    matrices = given({"normed": normed, "hidden": hidden, "residual": residual})
    vectors = given({"weight": weight, "inner_weight": inner_weight, "bias": bias})
    sums = given({"x_sumsq": x_sumsq, "normed_sumsq": normed_sumsq})
    check_fused(op, ("x", x), {**matrices, **vectors}, sums, dict.fromkeys(("x", *matrices), 2))
    rows, width = x.shape
    check(
        0 < width <= MAX_NORM_FEATURES and width % VECTOR == 0,
        f"{op}: x must have a multiple of {VECTOR} up to {MAX_NORM_FEATURES} as last size, got {width}",
    )
    for name, tensor in matrices.items():
        check_shape(op, name, tensor, [rows, width])
    for name, tensor in vectors.items():
        check_elements(op, name, tensor, width)
    for name, tensor in {"x": x, **matrices, **vectors, **sums}.items():
        check_contiguous(op, name, tensor)
    for name, tensor in {"x": x, **matrices, **vectors}.items():
        check_aligned(op, name, tensor)
    check_step(op, step, phase)
    for name, tensor in sums.items():
        check_rows(op, name, tensor, rows, step, phase)


@torch.no_grad()
def add_rms_norm_pytorch(
    normed: Tensor,
    hidden: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    inner_weight: Tensor | None = None,
    inner_eps: float = 0.0,
    unit_offset: bool = False,
    bias: Tensor | None = None,
    x_sumsq: Tensor | None = None,
    normed_sumsq: Tensor | None = None,
    step: int = 1,
    phase: int = 0,
) -> None:
    add_rms_norm_fake(
        normed,
        hidden,
        x,
        residual,
        weight,
        eps,
        inner_weight,
        inner_eps,
        unit_offset,
        bias,
        x_sumsq,
        normed_sumsq,
        step,
        phase,
    )
    if x_sumsq is not None:
        write_sumsq(x_sumsq, x, bias, step, phase)
    y = x if inner_weight is None else rms_norm(x, inner_weight, inner_eps, unit_offset)
    total = y if residual is None else residual + y
    if hidden is not None:
        hidden.copy_(total)
    normed.copy_(rms_norm(total, weight, eps, unit_offset))
    if normed_sumsq is not None:
        write_sumsq(normed_sumsq, normed, None, step, phase)


torch.library.impl(f"{NAMESPACE}::add_rms_norm_", "CompositeExplicitAutograd", add_rms_norm_pytorch)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """Compute RMSNorm over the last axis, operator by operator as in transformers' modules of Llama or Gemma."""
    wide = x.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (unit * (1.0 + weight.float())).to(x.dtype)
    return weight * unit.to(x.dtype)
