"""Weights of which a forward uses a shard: tensor parallelism divides rows or columns, expert parallelism experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.layers.sharded.units import unit_of
from plop_ext.layers.sharded.whole import shard_of

_TWICE = "two dimensions of a mesh divide its weight"
_BY_HAND = (
    "tensor parallelism by hand divides its weight (Megatron's form), and no mesh tells how; divide it by `tp_plan` "
    "or `parallelize_module`, or score the model before it is divided"
)
# Classes of Megatron, vLLM and DeepSpeed's AutoTP, whose weights are plain tensors of local sizes.
_HAND_MADE = ("ColumnParallel", "RowParallel", "LinearAllreduce", "LmHeadLinearAllreduce", "MergedColumnParallel")


@dataclass(frozen=True)
class Division:
    """How the processes of a group divide the weights of a module.

    Attributes:
        group: The group.
        rank: This process's rank in it.
        size: Number of processes.
        dim: Dimension of the weight that is divided; None if each process holds all of it.
        pieces: Number of equal packed matrices, such as gate and up, of each of which every process holds a part.
    """

    group: Any
    rank: int
    size: int
    dim: int | None
    pieces: int = 1

    def held(self, extent: int) -> Tensor:
        """Return the indices that this process holds, of a divided dimension of `extent`."""
        chunks = torch.arange(extent).view(self.pieces, -1).chunk(self.size, dim=1)
        return chunks[self.rank].reshape(-1) if self.rank < len(chunks) else torch.arange(0)


def division_of(module: nn.Module) -> Division | str | None:
    """Return how the weights of a module are divided in its forward; None if they are not; a reason if unknown.

    The dimensions over which FSDP shards the weights do not count, because FSDP gathers them before the forward.
    """
    if _is_hand_made(module):
        return _BY_HAND
    unit = unit_of(module)
    found: list[Division] = []
    for weight in module._parameters.values():
        if weight is None or shard_of(weight) is None:
            continue
        division = _division(weight, 0 if unit is None else unit.dimensions)
        if isinstance(division, str):
            return division
        if division is not None:
            found.append(division)
    divided = [division for division in found if division.dim is not None]
    return next(iter(divided or found), None)


def divided_over(model: nn.Module) -> int:
    """Return over how many processes the weights of a model are divided in its forward; 1 if they are not."""
    divisions = map(division_of, model.modules())
    return max((found.size for found in divisions if isinstance(found, Division) and found.dim is not None), default=1)


def partners_of(model: nn.Module, stages: Any) -> set[int]:
    """Return the global ranks of the processes that run the same batches, because they hold parts of one model.

    Args:
        model: What this process holds.
        stages: Group of the stages of a pipeline, or None.
    """
    distributed = torch.distributed
    found = {distributed.get_rank()} if stages is None else set(distributed.get_process_group_ranks(stages))
    for module in model.modules():
        division = division_of(module)
        if isinstance(division, Division):
            found.update(distributed.get_process_group_ranks(division.group))
    return found


def _division(weight: Any, first: int) -> Division | str | None:
    """Return how the dimensions of its mesh from `first` on divide a weight."""
    mesh = weight.device_mesh
    if first == mesh.ndim:
        return None
    divided = [dim for dim in range(first, mesh.ndim) if hasattr(weight.placements[dim], "dim") and mesh.size(dim) > 1]
    if len(divided) > 1:
        return _TWICE
    dim = divided[0] if divided else mesh.ndim - 1
    place = weight.placements[dim]
    of_weight = place.dim % weight.dim() if divided else None
    pieces = getattr(place, "split_factor", 1)
    return Division(mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim), of_weight, pieces)


def _is_hand_made(module: nn.Module) -> bool:
    """Return whether marks of a library tell that several processes hold parts of a plain weight."""
    weight = module._parameters.get("weight")
    name = type(module).__name__
    marked = getattr(weight, "tensor_model_parallel", False) or name.startswith(_HAND_MADE)
    marked = marked or bool(getattr(module, "_hf_quantized_needs_local_tp", False))
    if not marked or (weight is not None and shard_of(weight) is not None):
        return False
    size = getattr(module, "tp_size", None)
    if isinstance(size, int):
        return size > 1
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
