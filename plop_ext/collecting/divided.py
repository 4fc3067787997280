"""Inputs and outputs of which each process holds a part, as under tensor and sequence parallelism.

Squares add over columns and over rows, so each process writes a *contribution* to the sums of squares of the rows of a
call, and the contributions of a group of processes add up to the sums of the full vectors:

- columns of the vectors: the sums over these columns, by every process;
- rows of the sequence: the sums of these rows, and zero for the rows of others;
- whole vectors, which all processes hold: their sums by the first process, and zero by the others.

Squares do not add over partial sums of vectors, so these are left out by name.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from plop_ext import ops
from plop_ext.collecting.arena import Arena
from plop_ext.collecting.hooks import ExpertsObserver, Hook
from plop_ext.collecting.notes import IndexedLayers
from plop_ext.collecting.recording import Recording
from plop_ext.collecting.rows import as_rows, output_sumsq
from plop_ext.collecting.running_batch import RunningBatch
from plop_ext.collecting.token_map import TokenMap
from plop_ext.layers import Division, LayerAdapter, LinearLayer, Unsupported, division_of

_PARTIAL = "its output is a partial sum, which is added outside of the module; squares of partial sums do not add"
_UNKNOWN_ROWS = "its processes hold rows that are no equal pieces of the batch"
_UNLIKE = "its processes hold different outputs of the full size, as partial sums are; squares of these do not add"

# Rows by which whole outputs are told from partial sums, and the least difference of these, relative to the largest
# value; equal outputs of unlike devices differ by their rounding.
_COMPARED_ROWS = 4
_UNLIKE_VALUES = 0.02


class Share(NamedTuple):
    """What this process holds of an input or an output.

    Attributes:
        local: [..., columns].
        lead: Extents of the rows of the full tensor.
        columns: Whether `local` holds some of the columns of every vector.
        start: First row that `local` holds, along `dim`.
        dim: Dimension of `lead` that is divided; None if it is not.
    """

    local: Tensor
    lead: torch.Size
    columns: bool
    start: int = 0
    dim: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every process holds the whole tensor."""
        return not self.columns and self.dim is None


class DividedCall(NamedTuple):
    """One call of a module whose weight is divided.

    Attributes:
        key: Tensor by whose identity modules that share an input are recognized.
        x: The input.
        y: The output.
        bias: The bias that `y` includes, as far as this process holds it, or None.
        columns: Columns of `y.local` that belong to each layer; None for all.
    """

    key: Tensor
    x: Share
    y: Share
    bias: Tensor | None
    columns: list[Tensor | None]


class DividedArena(Arena):
    """Arena for the contributions of one group of processes, which are added before every reduction.

    Args:
        device: As for `Arena`.
        dtype: As for `Arena`.
        n_layers: As for `Arena`.
        group: The group. All its processes run the same batches, and hence reduce at the same calls.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, n_layers: int, group: Any) -> None:
        super().__init__(device, dtype, n_layers)
        self._group = group
        self._speaks = distributed.get_rank(group) == 0

    def add_divided(self, layers: IndexedLayers, call: DividedCall, token_map: TokenMap, time_first: bool) -> None:
        """Write the contributions to the sums of a call's input and of its output, once per layer."""
        self._admit(layers, token_map)
        start = self.inputs.find(call.key)
        if start is None:
            start = self._used
            self._contribute(call.x, None, None, None, token_map, time_first)
            self.inputs.add(call.key, start)
        for (index, layer), columns in zip(layers, call.columns, strict=True):
            self._records += (index, start, self._used)
            self._recorded.add(index)
            self._contribute(call.y, layer, columns, call.bias, token_map, time_first)

    def _contribute(
        self,
        share: Share,
        layer: LinearLayer | None,
        columns: Tensor | None,
        bias: Tensor | None,
        token_map: TokenMap,
        time_first: bool,
    ) -> None:
        out = self._take(token_map.rows)
        step, phase = token_map.step, token_map.phase
        if share.is_whole and not self._speaks:
            out.zero_()
        elif share.dim is None and not time_first:
            _sums(out, share, layer, columns, bias, step, phase)
        else:
            lead = share.local.shape[:-1]
            sums = torch.empty(lead.numel(), dtype=self.dtype, device=self.device)
            _sums(sums, share, layer, columns, bias, 1, 0)
            sums = sums.view(lead)
            if share.dim is not None:
                full = torch.zeros(share.lead, dtype=self.dtype, device=self.device)
                full.narrow(share.dim, share.start, lead[share.dim]).copy_(sums)
                sums = full
            if time_first:
                sums = sums.transpose(0, 1)
            out.copy_(sums.reshape(-1)[phase::step])

    def _reduce(self) -> None:
        if self._records:
            distributed.all_reduce(self._sums[: self._used], group=self._group)
        super()._reduce()


def _sums(
    out: Tensor,
    share: Share,
    layer: LinearLayer | None,
    columns: Tensor | None,
    bias: Tensor | None,
    step: int,
    phase: int,
) -> None:
    """Write the sums of squares of the local rows, or of some of their columns."""
    rows = share.local
    if columns is not None:
        rows = _selected(rows, columns)
        bias = None if bias is None else _selected(bias, columns).contiguous()
    if rows.numel() == 0:  # more processes than columns or rows
        out.zero_()
    elif layer is None or share.columns:
        ops.row_sumsq_(out, as_rows(rows), bias, step, phase)
    else:
        output_sumsq(out, as_rows(rows), bias, layer, step, phase)


def _selected(values: Tensor, columns: Tensor) -> Tensor:
    """Return columns of [..., M], as a view if they are neighbours."""
    count = len(columns)
    if count and int(columns[-1]) - int(columns[0]) == count - 1:
        return values[..., int(columns[0]) : int(columns[0]) + count]
    return values[..., columns.to(values.device)]


class DividedExpertsArena(Arena):
    """Arena for experts that a group of processes divides.

    Args:
        device: As for `Arena`.
        dtype: As for `Arena`.
        n_layers: As for `Arena`.
        group: The group. All its processes run the same batches.
        by_columns: Whether each process holds columns of every expert, so that the sums of its rows are contributions.
            Otherwise it holds whole experts, and its totals have zeros for the experts of others.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, n_layers: int, group: Any, by_columns: bool) -> None:
        super().__init__(device, dtype, n_layers)
        self._group = group
        self._by_columns = by_columns
        self._speaks = distributed.get_rank(group) == 0

    def add_routed(self, sums: Tensor, counted: Tensor, offsets: Tensor, records: list[int]) -> None:
        if self._by_columns:
            if not self._speaks:
                sums[: len(counted)].zero_()  # the input, which all processes hold
            distributed.all_reduce(sums, group=self._group)
        super().add_routed(sums, counted, offsets, records)

    def finish_batch(self) -> Tensor:
        totals = super().finish_batch()
        if not self._by_columns:
            distributed.all_reduce(totals, group=self._group)
        return totals


class DividedExpertsObserver(ExpertsObserver):
    """Observer of an experts module that a group of processes divides.

    Args:
        recording: The recording to write to.
        module: The module.
        layers: The scored layers of the module, with their rows in the totals.
        division: How its weights are divided: by experts, or by the columns of each.

    Attributes:
        skips_rows: Whether there are rows of experts that this process does not hold.
    """

    def __init__(self, recording: Recording, module: nn.Module, layers: IndexedLayers, division: Division) -> None:
        super().__init__(recording, module, layers)
        self.skips_rows = division.dim == 0
        self._left_out: IndexedLayers = ()
        by_columns = division.dim is not None and not self.skips_rows
        if self.skips_rows:
            first = division.rank * self._experts
            self._first_rows = [None if row is None else row + first for row in self._first_rows]
        elif by_columns and self._first_rows[-1] is not None:
            last = self._first_rows[-1]
            self._left_out = [item for item in layers if item[0] >= last]
            self._first_rows[-1] = None
        self._division = division
        self._key = (division.group, by_columns)
        self._make = partial(DividedExpertsArena, group=division.group, by_columns=by_columns)

    def _first_read(self, batch: RunningBatch, expert: Tensor) -> int:
        step, phase = batch.tokens.step, batch.tokens.phase
        if step == 1 or not self.skips_rows:
            return phase
        # In one process, the rows of the experts of the ranks before this one come first.
        held = torch.zeros(self._division.size, dtype=torch.int64, device=expert.device)
        held[self._division.rank] = (expert < self._experts).sum()
        distributed.all_reduce(held, group=self._division.group)
        return (phase - int(held[: self._division.rank].sum())) % step

    def _arena(self, batch: RunningBatch, hidden: Tensor) -> Arena:
        batch.notes.leave_out(self._left_out, _PARTIAL)
        return batch.arena_of(self._key, hidden.device, hidden.dtype, self._make)


class DividedHook(Hook):
    """Forward hook of a module whose weight the processes of a group divide.

    Args:
        recording: The recording to write to.
        module: The module.
        layers: The scored layers of the module, with their rows in the totals.
        division: How its weight is divided.
    """

    def __init__(self, recording: Recording, module: nn.Module, layers: IndexedLayers, division: Division) -> None:
        super().__init__(recording, module, layers)
        self._division = division
        self._in_features, out_features = self._adapter.features(module)
        self._out_features = out_features
        self._held, self._columns = _held_columns(layers, division, out_features)
        self._piece = None if self._bias is None else self._bias[self._held.to(self._bias.device)]
        self._pieces: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._compared = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        batch, adapter = self.recording.batch, self._adapter
        if batch is None:
            return
        fed = self.fed
        x = adapter.input(module, args, kwargs)
        if fed is None:
            fed = self.recording.feeding.ask(self, _local(x))
        try:
            # PEFT's changes of a weight are refused, because the base output would need a product over all processes.
            y = adapter.output(module, LayerAdapter.base_output(adapter, module, x, output))
            call = self._call(x, y)
        except Unsupported as error:
            batch.notes.leave_out(self._layers, str(error))
            return
        shape = torch.Size((*call.x.lead, self._in_features))
        group = self._division.group
        place = batch.placed(self._layers, shape, call.y.local, fed, group, partial(DividedArena, group=group))
        if place is not None:
            arena, token_map, time_first = place
            arena.add_divided(self._layers, call, token_map, time_first)

    def _call(self, x: Tensor, y: Tensor) -> DividedCall:
        lead = max(_lead(x), _lead(y), key=torch.Size.numel)
        x_share, y_share = (
            _share(tensor, lead, features, self._division)
            for tensor, features in ((x, self._in_features), (y, self._out_features))
        )
        self._compare(y_share)
        local = y_share.local
        if y_share.columns and local.shape[-1] != len(self._held):
            raise Unsupported(f"its process holds {local.shape[-1]} outputs, and the mesh says {len(self._held)}")
        if y_share.columns:
            bias = _cast(self._piece, local, self._pieces)
            return DividedCall(_shared(x, x_share.local), x_share, y_share, bias, self._columns)
        bias = _cast(self._bias, local, self._cast_biases)
        return DividedCall(_shared(x, x_share.local), x_share, y_share, bias, [None] * len(self._layers))

    def _compare(self, y: Share) -> None:
        """Compare a whole output over the processes, at the first call: nothing else tells it from a partial sum."""
        # Of a single column, the first process holds all, and the others nothing.
        if self._compared or not y.is_whole or self._out_features <= self._division.pieces:
            return
        self._compared = True
        rows = y.local.reshape(-1, y.local.shape[-1])[:_COMPARED_ROWS].double()
        bounds = torch.stack((rows, -rows))
        distributed.all_reduce(bounds, op=distributed.ReduceOp.MAX, group=self._division.group)
        spread, largest = (bounds[0] + bounds[1]).abs().max(), bounds.abs().max()
        if bool(spread > _UNLIKE_VALUES * largest):
            raise Unsupported(_UNLIKE)


def hook_of(recording: Recording, module: nn.Module, layers: IndexedLayers) -> Hook:
    """Return the hook of a module, whose weight may be divided in its forward."""
    division = division_of(module)
    if division is None:
        return Hook(recording, module, layers)
    assert not isinstance(division, str), division
    return DividedHook(recording, module, layers, division)


def observer_of(recording: Recording, module: nn.Module, layers: IndexedLayers) -> ExpertsObserver:
    """Return the observer of an experts module, which may be divided in its forward."""
    division = division_of(module)
    if division is None:
        return ExpertsObserver(recording, module, layers)
    assert not isinstance(division, str), division
    return DividedExpertsObserver(recording, module, layers, division)


def reduces_in_hook(module: nn.Module) -> bool:
    """Return whether torch's tensor parallelism adds or distributes the outputs in a forward hook of the module."""
    homes = (getattr(hook, "__module__", None) or "" for hook in module._forward_hooks.values())
    return any(home.startswith("torch.distributed.tensor") for home in homes)


def _held_columns(layers: IndexedLayers, division: Division, out_features: int) -> tuple[Tensor, list[Tensor | None]]:
    """Return the outputs that this process computes, and which of them belong to each layer; None for all."""
    if division.dim != 0:
        return torch.arange(out_features), [None] * len(layers)
    held = division.held(out_features)
    columns: list[Tensor | None] = []
    for _, layer in layers:
        if layer.split is None:
            columns.append(None)
        else:
            wanted = layer.split.select(torch.arange(out_features), layer.part).flatten()
            columns.append(torch.isin(held, wanted).nonzero().flatten())
    return held, columns


def _share(tensor: Any, lead: torch.Size, features: int, division: Division) -> Share:
    """Return what this process holds of a tensor [*lead, features]; raise `Unsupported` if that cannot be told."""
    local = _local(tensor)
    if _is_dtensor(tensor):
        places = [place for place in tensor.placements if not place.is_replicate()]
        if any(place.is_partial() for place in places):
            raise Unsupported(_PARTIAL)
        if len(places) > 1:
            raise Unsupported("two dimensions of a mesh divide its input or output")
        dim = places[0].dim % tensor.dim() if places else None
        if dim == tensor.dim() - 1:
            return Share(local, lead, True)
    elif local.shape[-1] < features:
        return Share(local, lead, True)
    else:
        differing = [dim for dim, extent in enumerate(lead) if local.shape[:-1][dim] != extent]
        dim = differing[0] if differing else None
        if len(differing) > 1:
            raise Unsupported(_UNKNOWN_ROWS)
    if local.shape[-1] != features:
        raise Unsupported(f"its process holds vectors of {local.shape[-1]} values, and the weight has {features}")
    if dim is None:
        return Share(local, lead, False)
    chunk = -(-lead[dim] // division.size)
    start = min(chunk * division.rank, lead[dim])
    if local.shape[dim] != min(chunk, lead[dim] - start):
        raise Unsupported(_UNKNOWN_ROWS)
    return Share(local, lead, False, start, dim)


def _lead(tensor: Tensor) -> torch.Size:
    """Return the extents of the rows of a tensor, or of the whole of which it is a shard."""
    return tensor.shape[:-1]


def _local(tensor: Any) -> Tensor:
    """Return what this process holds of a tensor, once it has arrived."""
    local = tensor.to_local() if _is_dtensor(tensor) else tensor
    local = local.wait() if hasattr(local, "wait") else local
    return local.detach() if local.requires_grad else local


def _shared(x: Tensor, local: Tensor) -> Tensor:
    """Return the tensor of which several modules' inputs are views: each gets a `DTensor` of its own."""
    base = local._base
    if not _is_dtensor(x) or base is None or base.shape != local.shape or base.stride() != local.stride():
        return x
    return base if base.data_ptr() == local.data_ptr() else x


def _is_dtensor(tensor: Any) -> bool:
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def _cast(bias: Tensor | None, y: Tensor, known: dict[tuple[torch.device, torch.dtype], Tensor]) -> Tensor | None:
    """Return the bias as it was added to `y`."""
    if bias is None or (bias.dtype == y.dtype and bias.device == y.device):
        return bias
    key = (y.device, y.dtype)
    if key not in known:
        known[key] = bias.to(*key)
    return known[key]
