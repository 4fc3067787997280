"""The running batch, to which hooks and fused kernels add their sums."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from plop_ext import ops
from plop_ext.collecting.arena import Arena, Call
from plop_ext.collecting.notes import IndexedLayers, Notes
from plop_ext.collecting.rows import as_rows, shape_as_rows
from plop_ext.collecting.token_map import BatchTokens, Reading, TokenMap
from plop_ext.collecting.transfer import to_device
from plop_ext.totals import TOTALS_FIELDS

A = TypeVar("A", bound=Arena)
MakeArena: TypeAlias = Callable[[torch.device, torch.dtype, int], A]
# By device, type of sums, and the group of processes that divide what is summed.
Arenas = dict[tuple[torch.device, torch.dtype, Any], Arena]


class RunningBatch:
    """One forward, from its announcement to its totals.

    Args:
        tokens: The rows that count.
        arenas: Arenas by device and type of sums. They outlive the batch, which adds arenas for further devices and
            types.
        n_layers: M, rows of the totals.
        notes: Observations in addition to the totals.
        last_call_only: Keep only the last call of a layer.
    """

    def __init__(self, tokens: BatchTokens, arenas: Arenas, n_layers: int, notes: Notes, last_call_only: bool) -> None:
        self.tokens = tokens
        self.arenas = arenas
        self.notes = notes
        self._n_layers = n_layers
        self._last_call_only = last_call_only
        self._calls: dict[tuple[str, bool, torch.Size, torch.Size, torch.device, torch.dtype], _Call] = {}
        self._deferring: list[Collection[nn.Module]] = [()]
        for arena in arenas.values():
            arena.start_batch(tokens.samples)

    def observe(
        self,
        module: nn.Module,
        layers: IndexedLayers,
        x: Tensor,
        x_sumsq: Tensor | None,
        y: Tensor,
        bias: Tensor | None,
        fed: bool = False,
    ) -> None:
        """Record one call of a module.

        Args:
            module: The module.
            layers: The scored layers of the module, with their rows in the totals.
            x: Input [..., K].
            x_sumsq: [rows] sums of squares of the vectors to which W is applied, if these are not the rows of `x`.
            y: Output [..., M].
            bias: The bias [M] that `y` includes, or None.
            fed: Whether the module reads another stream than the one in which it sits.
        """
        key = (layers[0][1].stream, fed, x.shape, y.shape, y.device, y.dtype)
        call = self._calls.get(key) if x_sumsq is None else None
        if call is None:
            call = self._read(layers, x, x_sumsq, y, fed)
            if call is None:
                return
            if x_sumsq is None:
                self._calls[key] = call
        token_map, arena, are_rows, time_first = call
        x_rows, y_rows = x, y
        if not are_rows or x.requires_grad or y.requires_grad:
            x_rows, y_rows = x if x_sumsq is not None else as_rows(x), as_rows(y)
        if time_first:
            x_rows, y_rows = x_rows.transpose(0, 1), y_rows.transpose(0, 1)
        if self._last_call_only:
            for index, _ in layers:
                arena.forget(index)
        # A kernel reads rows in the order of memory.
        deferred = module in self._deferring[-1] and x_sumsq is None and y_rows.is_contiguous()
        arena.add(layers, Call(x, x_rows, x_sumsq, y_rows, bias), token_map, deferred)

    def placed(
        self, layers: IndexedLayers, shape: torch.Size, y: Tensor, fed: bool, group: Any, make: MakeArena[A]
    ) -> tuple[A, TokenMap, bool] | None:
        """Return where to record a call of which the processes of a group hold parts, and how its rows are told.

        Args:
            layers: The scored layers of the module, with their rows in the totals.
            shape: Shape of the whole input.
            y: What this process holds of the output.
            fed: Whether the module reads another stream than the one in which it sits.
            group: The group.
            make: Function that makes an arena for the group.

        Returns:
            The arena, the map of the rows, and whether they are [T, B]; None if the rows cannot be assigned, which is
            noted.
        """
        stream, rows = layers[0][1].stream, shape[:-1].numel()
        if self._is_table(layers, fed, shape, rows):
            return None
        reading = Reading(stream, rows, fed, extents=_extents(shape[:-1], rows))
        token_map = self.map_for(reading, y.device, layers)
        if token_map is None:
            return None
        arena = self.arena_of(group, y.device, y.dtype, make)
        if self._last_call_only:
            for index, _ in layers:
                arena.forget(index)
        time_first = len(shape) == 3 and self.tokens.streams.time_first(stream, fed, shape)
        return arena, token_map, time_first

    @contextmanager
    def deferring(self, modules: Collection[nn.Module]) -> Iterator[None]:
        """Leave the outputs of `modules` to fused kernels within the block (`Emitter.output`)."""
        self._deferring.append(modules)
        try:
            yield
        finally:
            self._deferring.pop()

    def map_for(self, reading: Reading, device: torch.device, layers: IndexedLayers) -> TokenMap | None:
        """Return the map of a call of `layers`; if its rows cannot be assigned, note the reason and return None."""
        found = self.tokens.map_for(reading, device)
        if isinstance(found, TokenMap):
            return found
        self.notes.leave_out(layers, f"its {reading.rows} input rows {found}")
        return None

    def arena_for(self, device: torch.device, dtype: torch.dtype) -> Arena:
        """Return the arena for outputs of `dtype` on `device`."""
        return self.arena_of(None, device, dtype, Arena)

    def arena_of(self, group: Any, device: torch.device, dtype: torch.dtype, make: MakeArena[A]) -> A:
        """Return the arena of a group of processes for outputs of `dtype` on `device`, made by `make` if it is new."""
        key = (device, ops.sum_dtype(dtype), group)
        if key not in self.arenas:
            self.arenas[key] = make(key[0], key[1], self._n_layers)
            self.arenas[key].start_batch(self.tokens.samples)
        return cast(A, self.arenas[key])

    def finish(self) -> Tensor:
        """Reduce pending sums and return the totals [M, B, 5] float64, on the device of the first arena."""
        totals = [arena.finish_batch() for arena in self.arenas.values()]
        if not totals:
            return torch.zeros(self._n_layers, self.tokens.samples, len(TOTALS_FIELDS), dtype=torch.float64)
        merged = totals[0]
        for other in totals[1:]:
            merged = merged + to_device(other, merged.device)
        return merged

    def _read(self, layers: IndexedLayers, x: Tensor, x_sumsq: Tensor | None, y: Tensor, fed: bool) -> _Call | None:
        """Return how a call is read; if it cannot be read, return None and note the reason for `layers`."""
        x_shape, y_shape = shape_as_rows(x.shape), shape_as_rows(y.shape)
        rows = y_shape[:-1].numel()
        inputs = x_shape[:-1].numel() if x_sumsq is None else len(x_sumsq)
        if inputs != rows:
            self.notes.leave_out(layers, f"it maps {inputs} input rows to {rows} output rows")
            return None
        stream = layers[0][1].stream
        # A causal convolution pads both sides of its sequences [N, K, T]; its outputs past the last input are cut off.
        convolved = x_sumsq is not None and x.dim() == y.dim() == 3 and len(x) == len(y)
        after = max(0, y.shape[1] - x.shape[2]) if convolved else 0
        if self._is_table(layers, fed, x.shape, rows):
            return None
        # A convolution that keeps the size of its input reads one row at each position of x [N, K, *size].
        positions = x.shape[:-1] if x_sumsq is None else torch.Size((len(x), *x.shape[2:]))
        reading = Reading(stream, rows, fed, len(x) if after else 0, after, _extents(positions, rows))
        token_map = self.map_for(reading, y.device, layers)
        if token_map is None:
            return None
        time_first = x_sumsq is None and len(y_shape) == 3 and self.tokens.streams.time_first(stream, fed, x_shape)
        are_rows = x_shape == x.shape and y_shape == y.shape
        return _Call(token_map, self.arena_for(y.device, y.dtype), are_rows, time_first)

    def _is_table(self, layers: IndexedLayers, fed: bool, shape: torch.Size, rows: int) -> bool:
        """Return whether an input is not of the samples, or may not be, which is noted."""
        table = self.tokens.streams.is_table(layers[0][1].stream, fed, shape, rows)
        if isinstance(table, str):
            self.notes.leave_out(layers, f"its {rows} input rows {table}")
        return bool(table)


def _extents(positions: torch.Size, rows: int) -> tuple[int, ...]:
    """Return the extents of each sequence of an input, such as (heads, T), if there is one row at each position."""
    return tuple(positions[1:]) if len(positions) > 2 and positions.numel() == rows else ()


class _Call(NamedTuple):
    """How calls with an input and an output of some shape, type and device are read.

    Attributes:
        token_map: The map of their rows.
        arena: The arena for the sums.
        are_rows: Whether input and output have 2 or 3 dimensions.
        time_first: Whether inputs are [T, B, K] and outputs [T, B, M].
    """

    token_map: TokenMap
    arena: Arena
    are_rows: bool
    time_first: bool
