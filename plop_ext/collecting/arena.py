"""The buffer for the sums of squares of one device, until they are reduced to totals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plop_ext import ops
from plop_ext.collecting.deferred_outputs import DeferredOutputs
from plop_ext.collecting.notes import IndexedLayers
from plop_ext.collecting.rows import as_rows, output_sumsq
from plop_ext.collecting.summed_inputs import SummedInputs
from plop_ext.collecting.token_map import TokenMap
from plop_ext.collecting.transfer import to_device
from plop_ext.totals import TOTALS_FIELDS

# Size of the buffer of sums. 4 MiB hold 128 vectors of 8192 tokens; more saves nothing, because a reduction costs one
# launch of some microseconds.
_ARENA_ELEMENTS = 1 << 20
# Number of cached views of the buffer: the next forward of the same shape uses the same views, and making a view costs
# the host nearly as much as a launch.
_KEPT_VIEWS = 4096


class Call(NamedTuple):
    """One call of a module, as the arena reads it.

    Attributes:
        x: The input; modules that share an input are recognized by the identity of this tensor.
        x_rows: The input as [T, K] or [N, T, K], samples first; of any shape if `x_sumsq` is given.
        x_sumsq: [rows] sums of the vectors to which W is applied, if these are not the input's rows.
        y_rows: [T, M] or [N, T, M].
        bias: [M] or None, in `y_rows`' type or the type of its sums.
    """

    x: Tensor
    x_rows: Tensor
    x_sumsq: Tensor | None
    y_rows: Tensor
    bias: Tensor | None


class Arena:
    """Buffer for the sums of one device and dtype, and the totals of the running batch.

    Args:
        device: Device of the layers' outputs.
        dtype: float32 or float64.
        n_layers: Rows of the totals.

    Attributes:
        inputs: Inputs summed since the last reduction.
        deferred: Outputs that a fused kernel is about to read.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, n_layers: int) -> None:
        self.device = device
        self.dtype = dtype
        self._n_layers = n_layers
        self._sums = self._buffer(_ARENA_ELEMENTS)
        self._totals = torch.empty(0, device=device)
        self._views: dict[tuple[int, int], Tensor] = {}
        self._used = 0
        self._records: list[int] = []
        self._recorded: set[int] = set()
        self._map: TokenMap | None = None
        self.inputs = SummedInputs()
        self.deferred = DeferredOutputs()

    def start_batch(self, batch_size: int) -> None:
        shape = (self._n_layers, batch_size, len(TOTALS_FIELDS))
        with torch.inference_mode(False):
            self._totals = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.deferred.clear()
        self._reset()

    def finish_batch(self) -> Tensor:
        self._reduce()
        return self._totals

    def add(self, layers: IndexedLayers, call: Call, token_map: TokenMap, deferred: bool = False) -> None:
        """Sum the input of one call, and its output once per part.

        Args:
            layers: The module's parts with their rows in the totals.
            call: The call.
            token_map: Its rows.
            deferred: Leave the output to a fused kernel, through `self.deferred`.
        """
        x, x_rows, x_sumsq, y_rows, bias = call
        rows, step, phase = token_map.rows, token_map.step, token_map.phase
        self._admit(layers, token_map)
        in_start, paired = self._used, False
        known = None if x_sumsq is not None else self.inputs.find(x)
        if known is not None:
            in_start = known
        elif x_sumsq is not None:
            self._take(rows).copy_(x_sumsq[phase::step])
        else:
            # accelerate's offload passes the hook the input before its move to the device
            alike = x_rows.dtype == y_rows.dtype and x.device == self.device
            paired = alike and not deferred and layers[0][1].split is None
            if paired:
                ops.row_sumsq_pair_(self._take(2 * rows), x_rows, y_rows, bias, step, phase)
            else:
                ops.row_sumsq_(self._take(rows), to_device(x_rows, self.device), None, step, phase)
            self.inputs.add(x, in_start)
        for index, layer in layers:
            out_start = in_start + rows if paired else self._used
            if not paired:
                out = self._take(rows)
                if deferred:
                    self.deferred.add(out, y_rows, bias, layer)
                else:
                    output_sumsq(out, y_rows, bias, layer, step, phase)
            self._records += (index, in_start, out_start)
            self._recorded.add(index)

    def add_projected(self, layers: IndexedLayers, x: Tensor, token_map: TokenMap) -> list[Tensor]:
        """Sum the input of modules that a fused kernel replaces, and reserve the sums of their outputs.

        The kernel has to be launched next.

        Args:
            layers: The modules' parts with their rows in the totals.
            x: Their input [..., K], whose rows are those of `token_map`.
            token_map: The rows.

        Returns:
            The tensors to which the kernel writes the sums of the parts' outputs, which have no bias.
        """
        self._admit(layers, token_map)
        in_start = self.inputs.find(x)
        if in_start is None:
            in_start, sums = self._used, self._take(token_map.rows)
            ops.row_sumsq_(sums, as_rows(x), None, token_map.step, token_map.phase)
            self.inputs.add(x, in_start)
        found = []
        for index, _ in layers:
            self._records += (index, in_start, self._used)
            self._recorded.add(index)
            found.append(self._take(token_map.rows))
        return found

    def make_room(self, vectors: int, token_map: TokenMap) -> None:
        """Reduce now if the buffer has no room for the next `vectors` vectors of sums."""
        if self._map is not token_map or self._used + vectors * token_map.rows > self._sums.numel():
            self._reduce()
            self._map = token_map

    def input_sums(self, token_map: TokenMap) -> Tensor | None:
        """Return the tensor for the sums of a fused kernel's result; None if the arena is full."""
        if self._map is not token_map or self._used + token_map.rows > self._sums.numel():
            return None
        return self._take(token_map.rows)

    def add_routed(self, sums: Tensor, counted: Tensor, offsets: Tensor, records: list[int]) -> None:
        """Reduce the sums of a routed layer at once, because its rows have their own order (`ops.gain_totals_`).

        Args:
            sums: The sums; the first vector is that of the input of the first projections.
            counted: As for `ops.gain_totals_`.
            offsets: As for `ops.gain_totals_`.
            records: As for `ops.gain_totals_`.
        """
        ops.gain_totals_(self._totals, sums, counted, offsets, records)

    def forget(self, index: int) -> None:
        """Drop the totals of earlier calls of layer `index` in this batch."""
        if index in self._recorded:
            self._reduce()
        self._totals[index].zero_()

    def _admit(self, layers: IndexedLayers, token_map: TokenMap) -> None:
        """Make room for the sums of a call's input and of its outputs, one for each of `layers`."""
        for index, _ in layers:
            if index in self._recorded:  # a second call
                self._reduce()
                break
        room = (1 + len(layers)) * token_map.rows
        if self._map is not token_map or self._used + room > self._sums.numel():
            self._start(room, token_map)

    def _start(self, room: int, token_map: TokenMap) -> None:
        """Reduce, because the buffer has no `room` for the sums of a call or holds those of other rows."""
        self._reduce()
        self._map = token_map
        if room > self._sums.numel():
            self._sums = self._buffer(room)
            self._views.clear()

    def _buffer(self, elements: int) -> Tensor:
        # A tensor created in inference mode cannot be written outside of it, where the next batch may run.
        with torch.inference_mode(False):
            return torch.empty(elements, dtype=self.dtype, device=self.device)

    def _take(self, rows: int) -> Tensor:
        place = (self._used, rows)
        self._used += rows
        view = self._views.get(place)
        if view is None:
            if len(self._views) >= _KEPT_VIEWS:
                self._views.clear()
            view = self._views[place] = self._sums[place[0] : self._used]
        return view

    def _reduce(self) -> None:
        if self._map is not None:
            self.deferred.flush(self._map.step, self._map.phase)
        if self._records and self._map is not None:
            ops.gain_totals_(self._totals, self._sums, self._map.counted, self._map.offsets, self._records)
        self._reset()

    def _reset(self) -> None:
        self._used = 0
        self._records = []
        self._recorded.clear()
        self.inputs.clear()
        self._map = None
