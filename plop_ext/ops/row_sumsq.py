"""`row_sumsq_`: the sum of squares of each row, the pass over the activations that every score needs."""

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
    sum_dtype,
)

torch.library.define(
    f"{NAMESPACE}::row_sumsq_",
    "(Tensor(a!) out, Tensor x, Tensor? bias=None, int step=1, int phase=0) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_native = torch.ops.plop_ext.row_sumsq_.default


def row_sumsq_(out: Tensor, x: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0) -> None:
    r"""Write the sum of squares of each row of `x` to `out`: \(out_r = \sum_k (x_{rk} - b_k)^2\).

    The sums accumulate in float32 (float64 for float64 input). NaN and infinite elements make their row NaN or
    infinite, and so does an element above 1.8e19, whose square overflows float32; `gain_totals_` excludes such rows.
    On CUDA the work is enqueued on the current stream, without synchronization. The result of a row never depends on
    other rows, on strides or on alignment, and is bitwise repeatable.

    Inside `torch.compile` the op is plain PyTorch, which the compiler fuses with neighbouring operators; Inductor then
    squares half-precision values before it rounds them. A call of `torch.ops.plop_ext.row_sumsq_` remains one kernel.

    Args:
        out: [R] float32 (float64 if `x` is float64), contiguous, where R = `rows_read(rows of x, step, phase)`.
        x: [T, K] or [N, T, K] (rows are the N * T token vectors), any strides, float32, float64, float16 or bfloat16.
        bias: [K], subtracted from every row first, or with a 3-D `x` [T, K], one per inner row (per head); `x`'s dtype
            or float32 (float64 if `x` is).
        step: Read every `step`-th row only. Raise it to sample tokens.
        phase: The first row read, in [0, step).

    Raises:
        RuntimeError: If an argument has the wrong device, dtype, rank or size; the message names it.
    """
    if torch.compiler.is_compiling():
        traced_sumsq(out, x, bias, step, phase)
        return
    # FSDP releases the memory of weights between forwards and keeps the tensors, whose pointers lead nowhere.
    check(x.untyped_storage().nbytes() > 0 or x.numel() == 0, "row_sumsq_: x must have memory, got released storage")
    _native(out, x, bias, step, phase)


def traced_sumsq(out: Tensor, x: Tensor, bias: Tensor | None, step: int, phase: int) -> None:
    """Compute the sums as one reduction over `x`, which a compiler can fuse; taking a view checks its size."""
    dtype = sum_dtype(x.dtype)
    values = x.detach().to(dtype)
    if bias is not None:
        values = values - bias.detach().to(dtype).view(x.shape[-bias.dim() :])
    rows = values.flatten(0, -2)[phase::step]
    out.copy_((rows * rows).sum(dim=1).view(out.shape))


@register_fake("row_sumsq_")
def row_sumsq_fake(out: Tensor, x: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0) -> None:
    op = "row_sumsq_"
    check_device(op, "out", out, x)
    if bias is not None:
        check_device(op, "bias", bias, x)
    check(x.dtype in FLOATS, f"{op}: x must be float32, float64, float16 or bfloat16, got {dtype_name(x.dtype)}")
    check_dtype(op, "out", out, sum_dtype(x.dtype))
    if bias is not None:
        check_bias_dtype(op, bias, x)
    check_dimensions(op, "x", x)
    check_vector(op, "out", out)
    if bias is not None:
        check_bias_shape(op, bias, x)
    check_step(op, step, phase)
    check_rows(op, "out", out, x.shape[:-1].numel(), step, phase)


def check_bias_dtype(op: str, bias: Tensor, x: Tensor) -> None:
    fits = bias.dtype == x.dtype or (bias.dtype == torch.float32 and x.dtype != torch.float64)
    wanted = dtype_name(x.dtype) + (" or Float" if x.dtype in (torch.float16, torch.bfloat16) else "")
    check(fits, f"{op}: bias must be {wanted}, got {dtype_name(bias.dtype)}")


def check_dimensions(op: str, name: str, x: Tensor) -> None:
    check(x.dim() in (2, 3), f"{op}: {name} must have 2 or 3 dimensions, got {x.dim()}")


def check_bias_shape(op: str, bias: Tensor, x: Tensor) -> None:
    shape = x.shape[1:] if x.dim() == 3 and bias.dim() == 2 else x.shape[-1:]
    check(bias.dim() == len(shape), f"{op}: bias must have 1 dimensions, got {bias.dim()}")
    check(bias.is_contiguous(), f"{op}: bias must be contiguous, got a strided view")
    check(bias.shape == shape, f"{op}: bias must have {shape.numel()} elements, got {bias.numel()}")


@torch.no_grad()
def row_sumsq_pytorch(out: Tensor, x: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0) -> None:
    row_sumsq_fake(out, x, bias, step, phase)
    write_sumsq(out, x, bias, step, phase)


def write_sumsq(out: Tensor, x: Tensor, bias: Tensor | None, step: int, phase: int) -> None:
    """Write the sums by PyTorch, without checks."""
    rows = x.flatten(0, -2)[phase::step]
    if bias is not None:
        shift = bias.to(out.dtype)
        if bias.dim() == 2:
            shift = shift.expand(x.shape).flatten(0, -2)[phase::step]
        rows = rows.to(out.dtype) - shift
    out.copy_(torch.linalg.vector_norm(rows, dim=1, dtype=out.dtype).square_())


torch.library.impl(f"{NAMESPACE}::row_sumsq_", "CompositeExplicitAutograd", row_sumsq_pytorch)
