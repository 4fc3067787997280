"""`gain_totals_`: the sums of squares of one forward, reduced to totals per module and sample."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from plop_ext.ops._schema import NAMESPACE, check, check_device, check_dtype, check_vector, dtype_name, register_fake
from plop_ext.totals import TOTALS_FIELDS

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
    finite only adds to its skip count. The op copies nothing to the device and does not synchronize.

    Args:
        totals: [M, B, 5] float64, contiguous; fields as in `TOTALS_FIELDS`.
        sumsq: [C] float32 or float64, contiguous: the sums of squares of all records.
        counted: [R] bool: False excludes the row (padding, prompt tokens).
        offsets: [G * B + 1] int64, ascending: sample b of group g owns rows offsets[g * B + b] to
            offsets[g * B + b + 1]. A dense layer has one group; the groups of a routed layer are its experts. Rows
            before the first and after the last offset belong to no sample.
        records: Flat (module, in_start, out_start) triples: the row in `totals` of the record's first group, the
            others following it, and where its R input and R output sums start in `sumsq`. A module may appear once
            per call.

    Raises:
        RuntimeError: If an argument has the wrong device, dtype, rank, size or range; the message names it.
    """
    torch.ops.plop_ext.gain_totals_.default(totals, sumsq, counted, offsets, records)


@register_fake("gain_totals_")
def gain_totals_fake(totals: Tensor, sumsq: Tensor, counted: Tensor, offsets: Tensor, records: list[int]) -> None:
    op = "gain_totals_"
    for name, tensor in (("totals", totals), ("counted", counted), ("offsets", offsets)):
        check_device(op, name, tensor, sumsq)
    check_dtype(op, "totals", totals, torch.float64)
    check_dtype(op, "counted", counted, torch.bool)
    check_dtype(op, "offsets", offsets, torch.int64)
    check(
        sumsq.dtype in (torch.float32, torch.float64),
        f"{op}: sumsq must be float32 or float64, got {dtype_name(sumsq.dtype)}",
    )
    check(totals.dim() == 3, f"{op}: totals must have 3 dimensions, got {totals.dim()}")
    for name, tensor in (("sumsq", sumsq), ("counted", counted), ("offsets", offsets)):
        check_vector(op, name, tensor)
    check(totals.is_contiguous(), f"{op}: totals must be contiguous, got a strided view")
    fields = len(TOTALS_FIELDS)
    check(totals.shape[2] == fields, f"{op}: totals must be [M, B, {fields}], got {totals.shape[2]} fields")
    samples = totals.shape[1]
    cells = offsets.shape[0] - 1
    check(
        cells >= samples if samples else cells == 0,
        f"{op}: offsets must have {samples + 1} elements, got {offsets.shape[0]}",
    )
    groups = cells // samples if samples else 1
    check(
        not samples or cells == groups * samples,
        f"{op}: offsets must have one element and {samples} per group, got {offsets.shape[0]}",
    )
    check(
        len(records) % 3 == 0,
        f"{op}: records must be (module, in_start, out_start) triples, got {len(records)} numbers",
    )
    last = sumsq.shape[0] - counted.shape[0]
    for module, in_start, out_start in zip(records[0::3], records[1::3], records[2::3], strict=True):
        check(
            0 <= module <= totals.shape[0] - groups,
            f"{op}: records must name modules in [0, {totals.shape[0] - groups + 1}), got {module}",
        )
        check(
            0 <= in_start <= last and 0 <= out_start <= last,
            f"{op}: records must start in [0, {last}], got {in_start} and {out_start}",
        )
    firsts = sorted(records[0::3])
    for first, following in itertools.pairwise(firsts):
        check(following - first >= groups, f"{op}: records must name each module once, got module {following} twice")


@torch.no_grad()
def gain_totals_pytorch(totals: Tensor, sumsq: Tensor, counted: Tensor, offsets: Tensor, records: list[int]) -> None:
    gain_totals_fake(totals, sumsq, counted, offsets, records)
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
