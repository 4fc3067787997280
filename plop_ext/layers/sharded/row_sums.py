"""The sums of squares of the rows of a weight, of which this process may hold a shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plop_ext import ops
from plop_ext.layers.sharded.units import unit_of
from plop_ext.layers.sharded.whole import on_mesh, shard_of


def row_sums(weight: Tensor, module: nn.Module) -> Tensor:
    """Return the sum of squares of each row of a weight [..., K], whole on every process.

    Sums travel between processes, not weights. Sums of whole rows are gathered, so they are bitwise identical to those
    of one process; sums of pieces of rows, as under row-wise tensor parallelism, are added in float64.

    Args:
        weight: [..., K], plain or a `DTensor`.
        module: The module that holds it.

    Returns:
        [...] float32 or float64.
    """
    weight = weight.detach()
    shard = shard_of(weight)
    if shard is None:
        return _row_sums(weight)
    unit = unit_of(module)
    rows = _row_sums(shard if unit is None or unit.dtype is None else shard.to(unit.dtype))
    return _assembled(on_mesh(weight), rows)


def _row_sums(rows: Tensor) -> Tensor:
    sums = torch.empty(rows.shape[:-1], dtype=ops.sum_dtype(rows.dtype), device=rows.device)
    if not rows.numel():  # more processes than rows
        return sums.zero_()
    ops.row_sumsq_(sums.view(-1), rows)
    return sums


def _assembled(weight: Any, rows: Tensor) -> Tensor:
    """Return the sums of all rows, from those of this process' shard of `weight`."""
    from torch.distributed.tensor import Partial

    last = weight.dim() - 1
    placements = [
        Partial() if hasattr(place, "dim") and place.dim % weight.dim() == last else place
        for place in weight.placements
    ]
    if any(isinstance(place, Partial) for place in placements):
        rows = rows.double()
    shape = weight.shape[:-1]
    whole = type(weight).from_local(
        rows.to(weight.device_mesh.device_type),
        weight.device_mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    return whole.full_tensor()
