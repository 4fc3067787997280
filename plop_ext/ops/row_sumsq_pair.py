"""`row_sumsq_pair_`: `row_sumsq_` of a layer's input and output in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from plop_ext.ops._schema import (
    FLOATS,
    NAMESPACE,
    check,
    check_device,
    check_dtype,
    check_rows,
    check_step,
    check_vector,
    dtype_name,
    register_fake,
    rows_read,
    sum_dtype,
)
from plop_ext.ops.row_sumsq import check_bias_dtype, check_bias_shape, check_dimensions, traced_sumsq, write_sumsq

torch.library.define(
    f"{NAMESPACE}::row_sumsq_pair_",
    "(Tensor(a!) out, Tensor x, Tensor y, Tensor? bias=None, int step=1, int phase=0) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_native = torch.ops.plop_ext.row_sumsq_pair_.default


def row_sumsq_pair_(
    out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0
) -> None:
    r"""Write the sums of squares of the rows of `x`, then those of `y` less `bias`, to `out`.

    The result is bitwise identical to that of `row_sumsq_(out[:R], x, None, step, phase)` and
    `row_sumsq_(out[R:], y, bias, step, phase)`, also inside `torch.compile`. On CUDA it takes a single launch if the
    rows are contiguous, aligned to 16 bytes, and of more than 1 and up to 64 KiB, the dtype is not float64, and a bias
    has the same dtype. Otherwise it takes two launches, and also if a bias is subtracted from more than 4096 rows of
    less than 8 KiB.

    Args:
        out: [2 * R] float32 (float64 if `x` is float64), contiguous, where R = `rows_read(rows of x, step, phase)`.
        x: [T, K] or [N, T, K], any strides, float32, float64, float16 or bfloat16.
        y: [.., M] with as many rows as `x`, of the same dtype; any strides.
        bias: [M] or with a 3-D `y` [T, M], subtracted from `y` first; `y`'s dtype or float32 (float64 if `y` is).
        step: Read every `step`-th row only.
        phase: The first row read, in [0, step).

    Raises:
        RuntimeError: If an argument has the wrong device, dtype, rank or size; the message names it.
    """
    if torch.compiler.is_compiling():
        x_sums, y_sums = out.view(2, out.shape[0] // 2).unbind(0)
        traced_sumsq(x_sums, x, None, step, phase)
        traced_sumsq(y_sums, y, bias, step, phase)
    else:
        _native(out, x, y, bias, step, phase)


@register_fake("row_sumsq_pair_")
def row_sumsq_pair_fake(
    out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0
) -> None:
    op = "row_sumsq_pair_"
    check_device(op, "out", out, x)
    check_device(op, "y", y, x)
    if bias is not None:
        check_device(op, "bias", bias, x)
    check(x.dtype in FLOATS, f"{op}: x must be float32, float64, float16 or bfloat16, got {dtype_name(x.dtype)}")
    check_dtype(op, "y", y, x.dtype)
    check_dtype(op, "out", out, sum_dtype(x.dtype))
    if bias is not None:
        check_bias_dtype(op, bias, y)
    check_dimensions(op, "x", x)
    check_dimensions(op, "y", y)
    check_vector(op, "out", out)
    if bias is not None:
        check_bias_shape(op, bias, y)
    rows, y_rows = x.shape[:-1].numel(), y.shape[:-1].numel()
    check(y_rows == rows, f"{op}: y must have {rows} rows, got {y_rows}")
    check_step(op, step, phase)
    check_rows(op, "out", out, rows, step, phase, vectors=2)


@torch.no_grad()
def row_sumsq_pair_pytorch(
    out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0
) -> None:
    row_sumsq_pair_fake(out, x, y, bias, step, phase)
    rows = rows_read(x.shape[:-1].numel(), step, phase)
    write_sumsq(out[:rows], x, None, step, phase)
    write_sumsq(out[rows:], y, bias, step, phase)


torch.library.impl(f"{NAMESPACE}::row_sumsq_pair_", "CompositeExplicitAutograd", row_sumsq_pair_pytorch)
