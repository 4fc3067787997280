"""Inputs and outputs of layers as rows, one per token, and the sums of squares of a module's output."""

from __future__ import annotations

import torch
from torch import Tensor

from plop_ext import ops
from plop_ext.layers import LinearLayer, Split


def as_rows(x: Tensor) -> Tensor:
    """Return `x` as [T, K] or [N, T, K], detached, and without a copy if its strides allow it."""
    if x.requires_grad:
        x = x.detach()
    return x if x.dim() in (2, 3) else x.reshape(shape_as_rows(x.shape))


def shape_as_rows(shape: torch.Size) -> torch.Size:
    """Return the shape of the result of `as_rows`."""
    if len(shape) in (2, 3):
        return shape
    return torch.Size((1, *shape)) if len(shape) == 1 else torch.Size((shape[:-2].numel(), *shape[-2:]))


def columns_of(y: Tensor, layer: LinearLayer) -> Tensor:
    """Return the part of a module's output that belongs to `layer`."""
    return y if layer.split is None else layer.split.select(y, layer.part)


def output_sumsq(out: Tensor, rows: Tensor, bias: Tensor | None, layer: LinearLayer, step: int, phase: int) -> None:
    """Write the sums of squares of the part of a module's output [.., M] that belongs to `layer`."""
    if layer.split is None:
        ops.row_sumsq_(out, rows, bias, step, phase)
    else:
        part_sumsq(out, rows, bias, layer.split, layer.part, step, phase)


def part_sumsq(
    out: Tensor, y: Tensor, bias: Tensor | None, split: Split, part: int, step: int = 1, phase: int = 0
) -> None:
    """Write the sums of squares of one part of a packed output to `out`.

    A part in one column range is a view of the rows. A part that is spread over the heads is a view [T, heads, width],
    whose sums per head are added. In either case the output is read once in total, for any number of parts.
    """
    columns = split.select(y.reshape(-1, y.shape[-1]), part)
    shift = None if bias is None else split.select(bias, part)
    if columns.shape[1] == 1 or columns.shape[2] == 1:
        flat = None if shift is None else shift.flatten().contiguous()
        squeezed = columns.squeeze(2) if columns.shape[2] == 1 else columns.squeeze(1)
        ops.row_sumsq_(out, squeezed, flat, step, phase)
        return
    columns = columns[phase::step]
    sums = torch.empty(columns.shape[:2], dtype=out.dtype, device=out.device)
    ops.row_sumsq_(sums.view(-1), columns, None if shift is None else shift.contiguous())
    torch.sum(sums, dim=1, out=out)
