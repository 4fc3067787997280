"""The rows of a layer's input on a device: which of those read count, and to which sample each belongs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plop_ext.collecting.transfer import overwrite, to_device
from plop_ext.ops import rows_read
from plop_ext.streams.batch import BatchStreams
from plop_ext.streams.stream import Rows


@dataclass(frozen=True)
class Reading:
    """What a module reads in a batch.

    Attributes:
        stream: The stream in which the module sits (`plop_ext.layers.streams`).
        rows: R, how many rows.
        fed: Whether the rows are of another stream, as the keys and values of cross-attention are.
        sequences: N, for the rows of a convolution that looks past the end of N sequences.
        after: Rows that it adds at the end of each sequence. They are no tokens in a stream of tokens.
        extents: Of the input of one sequence, such as (heads, T); empty for an input [N, R, K] or [R, K].
    """

    stream: str
    rows: int
    fed: bool = False
    sequences: int = 0
    after: int = 0
    extents: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Rows of one layer call, as `ops.gain_totals_` takes them.

    Attributes:
        counted: [R] bool, on the layer's device.
        offsets: [S + 1] int64, on the layer's device.
        rows: R, the number of rows read.
        step: Distance between the rows read.
        phase: The first row read.
    """

    counted: Tensor
    offsets: Tensor
    rows: int
    step: int
    phase: int


class BatchTokens:
    """Token maps of one batch, made once per reading and device.

    Args:
        streams: The streams of the batch.
        step: Distance between the rows read, as for `ops.row_sumsq_`.
        phase: First row read.
    """

    def __init__(self, streams: BatchStreams, step: int = 1, phase: int = 0) -> None:
        self.streams = streams
        self.samples = streams.samples
        self.step = step
        self.phase = phase
        self._maps: dict[tuple[Reading, torch.device], TokenMap | str] = {}
        self._owners: dict[tuple[Reading, torch.device], tuple[Tensor, Tensor]] = {}

    def map_for(self, reading: Reading, device: torch.device) -> TokenMap | str:
        """Return the map of a call, or the reason why its rows cannot be assigned to samples."""
        key = (reading, device)
        if key not in self._maps:
            _check_not_captured(reading.rows, device)
            rows = self._rows(reading)
            self._maps[key] = rows if isinstance(rows, str) else self._make(rows, reading.rows, device)
        return self._maps[key]

    def owners(self, reading: Reading, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return [R] int64 sample and [R] bool counted, for the rows of a call that `map_for` assigns.

        Both cover all rows, for every `step`, because routed layers reorder the rows before every `step`-th is read.
        """
        key = (reading, device)
        if key not in self._owners:
            _check_not_captured(reading.rows, device)
            rows = self._rows(reading)
            assert not isinstance(rows, str), rows
            self._owners[key] = tuple(to_device(part, device) for part in _owned(rows, reading.rows))  # type: ignore[assignment]
        return self._owners[key]

    def fits(self, streams: BatchStreams) -> bool:
        """Return whether the batch of `streams` assigns rows wherever this batch does, and nowhere else."""
        return streams.samples == self.samples and all(
            isinstance(_laid_out(streams, reading), str) == isinstance(found, str)
            for (reading, _), found in self._maps.items()
        )

    def refill(self, streams: BatchStreams) -> None:
        """Copy the layout of another batch, which `fits`, to the memory of the existing maps, which a graph reads."""
        self.streams = streams
        for (reading, _), found in self._maps.items():
            rows = self._rows(reading)
            if isinstance(found, str) or isinstance(rows, str):
                continue
            counted, offsets = self._read_part(rows, reading.rows)
            overwrite(found.counted, counted)
            overwrite(found.offsets, offsets)
        for (reading, _), targets in self._owners.items():
            rows = self._rows(reading)
            assert not isinstance(rows, str), rows
            for target, source in zip(targets, _owned(rows, reading.rows), strict=True):
                overwrite(target, source)

    def _rows(self, reading: Reading) -> Rows | str:
        return _laid_out(self.streams, reading)

    def _make(self, rows: Rows, count: int, device: torch.device) -> TokenMap:
        counted, offsets = self._read_part(rows, count)
        read = rows_read(count, self.step, self.phase)
        return TokenMap(to_device(counted, device), to_device(offsets, device), read, self.step, self.phase)

    def _read_part(self, rows: Rows, count: int) -> tuple[Tensor, Tensor]:
        """Return what counts of the rows that are read, and where among them each sample starts."""
        # Row i is the ((i - phase) / step)-th row read: a sample starts at the first one read that is not before it.
        offsets = ((rows.starts - self.phase + self.step - 1) // self.step).clamp_(min=0)
        counted = torch.ones(count, dtype=torch.bool) if rows.counted is None else rows.counted
        # A copy, because a graph overwrites it, and the mask may be the caller's.
        counted = counted[self.phase :: self.step].clone(memory_format=torch.contiguous_format)
        return counted, offsets


def _laid_out(streams: BatchStreams, reading: Reading) -> Rows | str:
    """Return the layout of all rows of a call, or the reason why it cannot be told."""
    added = reading.sequences * reading.after if streams.of_tokens(reading.stream) else 0
    rows = streams.rows(reading.stream, reading.fed, reading.rows - added, reading.extents)
    if not added or isinstance(rows, str):
        return rows
    length = reading.rows // reading.sequences - reading.after
    counted = torch.ones(reading.rows - added, dtype=torch.bool) if rows.counted is None else rows.counted
    counted = torch.nn.functional.pad(counted.view(-1, length), (0, reading.after)).reshape(-1)
    return Rows(rows.starts // length * (length + reading.after) + rows.starts % length, counted)


def _owned(rows: Rows, count: int) -> tuple[Tensor, Tensor]:
    """Return [R] int64 sample and [R] bool counted on the CPU; rows of no sample do not count."""
    index = torch.arange(count)
    samples = torch.searchsorted(rows.starts[1:].contiguous(), index, right=True)
    counted = torch.ones(count, dtype=torch.bool) if rows.counted is None else rows.counted.cpu()
    last = len(rows.starts) - 2
    return samples.clamp(max=max(0, last)), counted & (samples <= last) & (index >= rows.starts[0])


def _check_not_captured(rows: int, device: torch.device) -> None:
    """Refuse to make a map in a capture: it is made on the host, in memory that is freed before the replay."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a layer reads {rows} token vectors; in the forward before the capture, no layer did")
