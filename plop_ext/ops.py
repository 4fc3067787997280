"""The two ops behind every score: schema, fake and PyTorch kernel of each, one below the other.

The native kernels live in `csrc/` and register for CPU and CUDA when this module is imported; the PyTorch kernels here
serve every other device and installations without a native build. Neither op is differentiable: both read detached
activations and return nothing.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from plop_ext import native
from plop_ext.totals import TOTALS_FIELDS

NAMESPACE = "plop_ext"
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which `row_sumsq_` sums elements of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_read(rows: int, step: int = 1, phase: int = 0) -> int:
    """Number of rows among `rows` that start at `phase` and lie `step` apart."""
    return max(0, -(-(rows - phase) // step))


# ---------------------------------------------------------------------------------------------------------- row_sumsq_

torch.library.define(
    f"{NAMESPACE}::row_sumsq_",
    "(Tensor(a!) out, Tensor x, Tensor? bias=None, int step=1, int phase=0) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def row_sumsq_(out: Tensor, x: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0) -> None:
    r"""Write the sum of squares of each row of `x` to `out`: \(out_r = \sum_k (x_{rk} - b_k)^2\).

    Accumulates in float32 (float64 for float64 input). NaN and infinite elements make their row NaN or infinite, and
    so does an element above 1.8e19, whose square leaves float32; `gain_totals_` leaves such rows out. On CUDA the
    work is enqueued on the current stream and nothing waits for it. A row's result never depends on the other rows,
    on strides or on alignment, and is bitwise repeatable.

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
    torch.ops.plop_ext.row_sumsq_.default(out, x, bias, step, phase)


@torch.library.register_fake(f"{NAMESPACE}::row_sumsq_")
def _row_sumsq_fake(out: Tensor, x: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0) -> None:
    op = "row_sumsq_"
    _check_device(op, "out", out, x)
    if bias is not None:
        _check_device(op, "bias", bias, x)
    _check(x.dtype in FLOATS, f"{op}: x must be float32, float64, float16 or bfloat16, got {_name(x.dtype)}")
    _check_dtype(op, "out", out, sum_dtype(x.dtype))
    if bias is not None:
        fits = bias.dtype == x.dtype or (bias.dtype == torch.float32 and x.dtype != torch.float64)
        wanted = _name(x.dtype) + (" or Float" if x.dtype in (torch.float16, torch.bfloat16) else "")
        _check(fits, f"{op}: bias must be {wanted}, got {_name(bias.dtype)}")
    _check(x.dim() in (2, 3), f"{op}: x must have 2 or 3 dimensions, got {x.dim()}")
    _check_vector(op, "out", out)
    if bias is not None:
        shape = x.shape[1:] if x.dim() == 3 and bias.dim() == 2 else x.shape[-1:]
        _check(bias.dim() == len(shape), f"{op}: bias must have 1 dimensions, got {bias.dim()}")
        _check(bias.is_contiguous(), f"{op}: bias must be contiguous, got a strided view")
        _check(bias.shape == shape, f"{op}: bias must have {shape.numel()} elements, got {bias.numel()}")
    _check(step >= 1, f"{op}: step must be at least 1, got {step}")
    _check(0 <= phase < step, f"{op}: phase must be in [0, step), got {phase}")
    rows = x.shape[:-1].numel()
    expected = -((phase - rows) // step)
    if not torch.compiler.is_compiling():
        expected = max(0, expected)
    _check(out.shape[0] == expected, f"{op}: out must have {expected} elements, got {out.shape[0]}")


def row_sumsq_pytorch(out: Tensor, x: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0) -> None:
    _row_sumsq_fake(out, x, bias, step, phase)
    rows = x.flatten(0, -2)[phase::step]
    if bias is not None:
        shift = bias.to(out.dtype)
        if bias.dim() == 2:
            shift = shift.expand(x.shape).flatten(0, -2)[phase::step]
        rows = rows.to(out.dtype) - shift
    out.copy_(torch.linalg.vector_norm(rows, dim=1, dtype=out.dtype).square_())


torch.library.impl(f"{NAMESPACE}::row_sumsq_", "CompositeExplicitAutograd", row_sumsq_pytorch)


# -------------------------------------------------------------------------------------------------------- gain_totals_

torch.library.define(
    f"{NAMESPACE}::gain_totals_",
    "(Tensor(a!) totals, Tensor sumsq, Tensor counted, Tensor offsets, int[] records) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def gain_totals_(totals: Tensor, sumsq: Tensor, counted: Tensor, offsets: Tensor, records: list[int]) -> None:
    r"""Add the token gains of one forward to per-(module, sample) totals.

    The gain of a token is \(r_t = \lVert W z_t \rVert / \lVert z_t \rVert = \sqrt{s^{out}_t / s^{in}_t}\) (PLoP, arXiv
    2506.20629). Each record adds, over the counted rows of every sample, (sum r, sum r^2, tokens, zero-input tokens,
    non-finite tokens) in float64 and in a fixed order. A token whose input is exactly zero or whose sums are not
    finite only adds to its skip count. Nothing is copied to the device and nothing waits for it.

    Args:
        totals: [M, B, 5] float64, contiguous; fields as in `TOTALS_FIELDS`.
        sumsq: [C] float32 or float64, contiguous: the sums of squares of all records.
        counted: [R] bool: False leaves the row out (padding, prompt tokens).
        offsets: [G * B + 1] int64, ascending: sample b of group g owns rows offsets[g * B + b] to
            offsets[g * B + b + 1]. A dense layer has one group; the groups of a routed layer are its experts. Rows
            before the first and after the last offset belong to nobody.
        records: Flat (module, in_start, out_start) triples: the row in `totals` of the record's first group, the
            others following it, and where its R input and R output sums start in `sumsq`. A module may appear once
            per call.

    Raises:
        RuntimeError: If an argument has the wrong device, dtype, rank, size or range; the message names it.
    """
    torch.ops.plop_ext.gain_totals_.default(totals, sumsq, counted, offsets, records)


@torch.library.register_fake(f"{NAMESPACE}::gain_totals_")
def _gain_totals_fake(totals: Tensor, sumsq: Tensor, counted: Tensor, offsets: Tensor, records: list[int]) -> None:
    op = "gain_totals_"
    for name, tensor in (("totals", totals), ("counted", counted), ("offsets", offsets)):
        _check_device(op, name, tensor, sumsq)
    _check_dtype(op, "totals", totals, torch.float64)
    _check_dtype(op, "counted", counted, torch.bool)
    _check_dtype(op, "offsets", offsets, torch.int64)
    _check(
        sumsq.dtype in (torch.float32, torch.float64),
        f"{op}: sumsq must be float32 or float64, got {_name(sumsq.dtype)}",
    )
    _check(totals.dim() == 3, f"{op}: totals must have 3 dimensions, got {totals.dim()}")
    for name, tensor in (("sumsq", sumsq), ("counted", counted), ("offsets", offsets)):
        _check_vector(op, name, tensor)
    _check(totals.is_contiguous(), f"{op}: totals must be contiguous, got a strided view")
    fields = len(TOTALS_FIELDS)
    _check(totals.shape[2] == fields, f"{op}: totals must be [M, B, {fields}], got {totals.shape[2]} fields")
    samples = totals.shape[1]
    cells = offsets.shape[0] - 1
    _check(
        cells >= samples if samples else cells == 0,
        f"{op}: offsets must have {samples + 1} elements, got {offsets.shape[0]}",
    )
    groups = cells // samples if samples else 1
    _check(
        not samples or cells == groups * samples,
        f"{op}: offsets must have one element and {samples} per group, got {offsets.shape[0]}",
    )
    _check(
        len(records) % 3 == 0,
        f"{op}: records must be (module, in_start, out_start) triples, got {len(records)} numbers",
    )
    last = sumsq.shape[0] - counted.shape[0]
    for module, in_start, out_start in zip(records[0::3], records[1::3], records[2::3], strict=True):
        _check(
            0 <= module <= totals.shape[0] - groups,
            f"{op}: records must name modules in [0, {totals.shape[0] - groups + 1}), got {module}",
        )
        _check(
            0 <= in_start <= last and 0 <= out_start <= last,
            f"{op}: records must start in [0, {last}], got {in_start} and {out_start}",
        )
    firsts = sorted(records[0::3])
    for first, following in itertools.pairwise(firsts):
        _check(following - first >= groups, f"{op}: records must name each module once, got module {following} twice")


def gain_totals_pytorch(totals: Tensor, sumsq: Tensor, counted: Tensor, offsets: Tensor, records: list[int]) -> None:
    _gain_totals_fake(totals, sumsq, counted, offsets, records)
    rows = counted.shape[0]
    if totals.shape[1] == 0 or rows == 0:
        return
    samples, cells = totals.shape[1], offsets.shape[0] - 1
    index = torch.arange(rows, device=sumsq.device)
    # offsets[c] <= row < offsets[c + 1]; rows before the first or after the last offset belong to no cell.
    cell = torch.searchsorted(offsets, index, right=True) - 1
    inside = counted & (cell >= 0) & (cell < cells)
    if cells == samples:
        membership = torch.nn.functional.one_hot(cell.clamp(0, cells - 1), cells).double()
    segments = offsets.clamp(0, rows)
    for module, in_start, out_start in zip(records[0::3], records[1::3], records[2::3], strict=True):
        s_in = sumsq[in_start : in_start + rows].double()
        s_out = sumsq[out_start : out_start + rows].double()
        finite = s_in.isfinite() & s_out.isfinite()
        used = inside & finite & (s_in != 0)
        gain_sq = torch.where(used, s_out / s_in, 0.0)
        fields = torch.stack((gain_sq.sqrt(), gain_sq, used, inside & finite & (s_in == 0), inside & ~finite))
        if cells == samples:
            totals[module] += (fields.double() @ membership).T
        else:  # a matrix of rows x cells would not fit
            sums = torch.segment_reduce(fields.double().T.contiguous(), "sum", offsets=segments, axis=0)
            totals[module : module + cells // samples] += sums.view(-1, samples, len(TOTALS_FIELDS))


torch.library.impl(f"{NAMESPACE}::gain_totals_", "CompositeExplicitAutograd", gain_totals_pytorch)


def _name(dtype: torch.dtype) -> str:
    """The dtype's name as libtorch prints it, so that fake and native messages are the same."""
    names = {torch.float32: "Float", torch.float64: "Double", torch.float16: "Half", torch.bfloat16: "BFloat16"}
    names |= {torch.int64: "Long", torch.int32: "Int", torch.int16: "Short", torch.int8: "Char", torch.uint8: "Byte"}
    names |= {torch.bool: "Bool", torch.complex64: "ComplexFloat", torch.complex128: "ComplexDouble"}
    return names.get(dtype, str(dtype))


def _check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: message)


def _check_device(op: str, name: str, tensor: Tensor, other: Tensor) -> None:
    _check(tensor.device == other.device, f"{op}: {name} must be on {other.device}, got {tensor.device}")


def _check_dtype(op: str, name: str, tensor: Tensor, expected: torch.dtype) -> None:
    _check(tensor.dtype == expected, f"{op}: {name} must be {_name(expected)}, got {_name(tensor.dtype)}")


def _check_vector(op: str, name: str, tensor: Tensor) -> None:
    _check(tensor.dim() == 1, f"{op}: {name} must have 1 dimensions, got {tensor.dim()}")
    _check(tensor.is_contiguous(), f"{op}: {name} must be contiguous, got a strided view")


STATUS = native.load()
