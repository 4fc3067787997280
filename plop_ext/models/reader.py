"""The reader of tensors from files to a device: in parallel, through pinned memory, on a separate stream.

It reads into reused buffers instead of a memory map, whose pages would count towards the memory of the process.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from plop_ext.errors import InputError
from plop_ext.models.checkpoint import TensorEntry

# Large enough for the full speed of disk and bus, small enough for a ring of several.
CHUNK = 32 << 20
READERS = 8
# Tensors start at multiples of this in a buffer, as in memory that torch allocates itself.
_ALIGNMENT = 256


@dataclass(frozen=True)
class _Piece:
    """Bytes of one tensor: where they are in the file, and where they go in the tensor."""

    entry: TensorEntry
    offset: int
    n_bytes: int

    @property
    def start(self) -> int:
        return self.entry.start + self.offset


def buffer_size(entries: Iterable[TensorEntry]) -> int:
    """Return the bytes of the buffer that holds `entries`."""
    return sum(_aligned(entry.n_bytes) for entry in entries)


def in_buffer(entries: Iterable[TensorEntry], buffer: Tensor) -> dict[str, Tensor]:
    """Return a view for each tensor of `entries`, by key, in a uint8 buffer of at least `buffer_size`."""
    views, place = {}, 0
    for entry in entries:
        flat = buffer[place : place + entry.n_bytes]
        views[entry.key] = flat.view(cast(torch.dtype, entry.dtype)).view(entry.shape)
        place += _aligned(entry.n_bytes)
    return views


@dataclass(frozen=True)
class Pending:
    """Tensors that are being read.

    Attributes:
        targets: The tensors, by key. Those of a reading with `writable` may be added until that is set.
        chunks: The reads, in the order of the files.
        of_key: The reads that each tensor needs.
    """

    targets: Mapping[str, Tensor]
    chunks: list[Future[None]]
    of_key: dict[str, list[Future[None]]]


class Reader:
    """Reads tensors into device memory.

    Args:
        device: Device to read to.

    Attributes:
        stream: The stream of the copies; None on a CPU.
        bytes_read: Bytes read so far.
        seconds: Time during which at least one read was in progress.
    """

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.device = device
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.bytes_read = 0
        self.seconds = 0.0
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._reading = 0
        self._began = 0.0
        self._closed = False
        readers = min(READERS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="plop-read")
        self._ring: queue.Queue[tuple[Tensor, torch.cuda.Event]] = queue.Queue()
        for _ in range(readers + 2 if cuda else 0):
            staging = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
            self._ring.put((staging, torch.cuda.Event()))

    def on_stream(self) -> AbstractContextManager[object]:
        """Return a context in which work is enqueued on the stream of the copies."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def read(self, entries: Sequence[TensorEntry], buffer: Tensor) -> Mapping[str, Tensor]:
        """Read `entries` into `buffer`, a uint8 tensor of at least `buffer_size`.

        Returns:
            Views of the buffer by key. On CUDA they are complete when `stream` has run the work enqueued so far.
        """
        return self.finish(self.begin(entries, in_buffer(entries, buffer)))

    def begin(
        self,
        entries: Sequence[TensorEntry],
        targets: Mapping[str, Tensor],
        writable: threading.Event | None = None,
    ) -> Pending:
        """Begin to read `entries`.

        Args:
            entries: The tensors to read.
            targets: Contiguous tensors of their shapes and types on the device of the reader, by key.
            writable: Set when `targets` is complete and may be written. Until then, reading stops when the pinned
                memory is full; on a CPU, it does not start. Finish every other reading before you begin one with
                `writable`.
        """
        ordered = sorted(entries, key=lambda entry: (entry.path, entry.start))
        for path in {entry.path for entry in ordered} - self._files.keys():
            self._files[path] = os.open(path, os.O_RDONLY)
        chunks, of_key = [], {entry.key: list[Future[None]]() for entry in ordered}
        for pieces in _chunks(ordered):
            chunks.append(self._pool.submit(self._read_chunk, pieces, targets, writable))
            for key in {piece.entry.key for piece in pieces}:
                of_key[key].append(chunks[-1])
        return Pending(targets, chunks, of_key)

    def finish(self, pending: Pending) -> Mapping[str, Tensor]:
        """Wait for the reads of `begin`; return its targets, complete as `read` says."""
        for chunk in pending.chunks:
            chunk.result()
        return pending.targets

    def close(self, writable: threading.Event | None = None) -> None:
        """Close the files and end the threads; `writable` is the event of an unfinished reading."""
        self._closed = True
        if writable is not None:
            writable.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self.stream is not None:  # after an error, targets may be freed while copies to them are still queued
            self.stream.synchronize()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _read_chunk(
        self, pieces: Sequence[_Piece], targets: Mapping[str, Tensor], writable: threading.Event | None
    ) -> None:
        if self.stream is None:
            if writable is not None:
                writable.wait()
            if not self._closed:
                self._fill(pieces, [_bytes(targets, piece) for piece in pieces])
            return
        staging, free = self._ring.get()
        try:
            free.synchronize()
            staged = staging.split_with_sizes(_shares(pieces, staging.numel()))[: len(pieces)]
            self._fill(pieces, staged)
            if writable is not None:
                writable.wait()
            if not self._closed:
                with torch.cuda.stream(self.stream):
                    for piece, source in zip(pieces, staged, strict=True):
                        _bytes(targets, piece).copy_(source, non_blocking=True)
                    free.record(self.stream)
        finally:
            self._ring.put((staging, free))

    def _fill(self, pieces: Sequence[_Piece], targets: Sequence[Tensor]) -> None:
        """Read pieces into tensors of bytes on the host."""
        self._count(1, 0)
        try:
            for piece, target in zip(pieces, targets, strict=True):
                memory, done = target.numpy().data, 0
                while done < piece.n_bytes:
                    room = memory[done : piece.n_bytes]
                    count = os.preadv(self._files[piece.entry.path], [room], piece.start + done)
                    if count == 0:
                        raise InputError(f"`{piece.entry.path}` became shorter while it was read")
                    done += count
        finally:
            self._count(-1, sum(piece.n_bytes for piece in pieces))

    def _count(self, change: int, n_bytes: int) -> None:
        """Count reads in progress, and the time while there are any."""
        with self._lock:
            if self._reading == 0:
                self._began = time.perf_counter()
            self._reading += change
            self.bytes_read += n_bytes
            if self._reading == 0:
                self.seconds += time.perf_counter() - self._began


def _chunks(entries: Iterable[TensorEntry]) -> Iterable[list[_Piece]]:
    """Yield pieces that together fill at most one chunk; tensors that are larger are cut."""
    chunk: list[_Piece] = []
    filled = 0
    for entry in entries:
        for offset in range(0, entry.n_bytes, CHUNK):
            piece = _Piece(entry, offset, min(CHUNK, entry.n_bytes - offset))
            if chunk and filled + piece.n_bytes > CHUNK:
                yield chunk
                chunk, filled = [], 0
            chunk.append(piece)
            filled += piece.n_bytes
    if chunk:
        yield chunk


def _bytes(targets: Mapping[str, Tensor], piece: _Piece) -> Tensor:
    """Return the bytes of a piece in its tensor."""
    flat = targets[piece.entry.key].view(-1).view(torch.uint8)
    return flat[piece.offset : piece.offset + piece.n_bytes]


def _shares(pieces: Sequence[_Piece], room: int) -> list[int]:
    """Return the sizes of the pieces in the pinned memory, and the rest of it."""
    sizes = [piece.n_bytes for piece in pieces]
    return [*sizes, room - sum(sizes)]


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
