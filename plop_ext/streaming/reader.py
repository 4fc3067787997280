"""The reader of tensors from files to a device: in parallel, through pinned memory, on a separate stream.

It reads into reused buffers instead of a memory map, whose pages would count towards the memory of the process.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterable, Sequence
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
    """Bytes of one file with their place in the buffer."""

    path: Path
    start: int
    n_bytes: int
    place: int


def buffer_size(entries: Iterable[TensorEntry]) -> int:
    """Return the bytes of the buffer that holds `entries`."""
    return sum(_aligned(entry.n_bytes) for entry in entries)


@dataclass(frozen=True)
class Pending:
    """Tensors that are being read.

    Attributes:
        views: Views of the buffer that will hold them, by key.
        chunks: The reads.
    """

    views: dict[str, Tensor]
    chunks: list[Future[None]]


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

    def read(self, entries: Sequence[TensorEntry], buffer: Tensor) -> dict[str, Tensor]:
        """Read `entries` into `buffer`, a uint8 tensor of at least `buffer_size`.

        Returns:
            Views of the buffer by key. On CUDA they are complete when `stream` has run the work enqueued so far.
        """
        return self.finish(self.begin(entries, buffer))

    def begin(
        self, entries: Sequence[TensorEntry], buffer: Tensor, writable: threading.Event | None = None
    ) -> Pending:
        """Begin to read `entries` into `buffer`.

        Args:
            entries: The tensors to read.
            buffer: As for `read`.
            writable: Set when the buffer may be written. Until then, reading stops when the pinned memory is full; on
                a CPU, it does not start. Finish every other reading before you begin one with `writable`.
        """
        views, pieces, place = {}, [], 0
        for entry in sorted(entries, key=lambda entry: (entry.path, entry.start)):
            flat = buffer[place : place + entry.n_bytes]
            views[entry.key] = flat.view(cast(torch.dtype, entry.dtype)).view(entry.shape)
            pieces.append(_Piece(entry.path, entry.start, entry.n_bytes, place))
            place += _aligned(entry.n_bytes)
        for path in {piece.path for piece in pieces} - self._files.keys():
            self._files[path] = os.open(path, os.O_RDONLY)
        jobs = [self._pool.submit(self._read_chunk, chunk, buffer, writable) for chunk in _chunks(pieces)]
        return Pending(views, jobs)

    def finish(self, pending: Pending) -> dict[str, Tensor]:
        """Wait for the reads of `begin`; return what `read` returns."""
        for chunk in pending.chunks:
            chunk.result()
        return pending.views

    def close(self, writable: threading.Event | None = None) -> None:
        """Close the files and end the threads; `writable` is the event of an unfinished reading."""
        self._closed = True
        if writable is not None:
            writable.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _read_chunk(self, pieces: Sequence[_Piece], buffer: Tensor, writable: threading.Event | None) -> None:
        start, stop = pieces[0].place, pieces[-1].place + pieces[-1].n_bytes
        if self.stream is None:
            if writable is not None:
                writable.wait()
            if not self._closed:
                self._fill(pieces, buffer[start:stop])
            return
        staging, free = self._ring.get()
        try:
            free.synchronize()
            self._fill(pieces, staging)
            if writable is not None:
                writable.wait()
            if not self._closed:
                with torch.cuda.stream(self.stream):
                    buffer[start:stop].copy_(staging[: stop - start], non_blocking=True)
                    free.record(self.stream)
        finally:
            self._ring.put((staging, free))

    def _fill(self, pieces: Sequence[_Piece], target: Tensor) -> None:
        self._count(1, 0)
        try:
            memory = target.numpy().data
            for piece in pieces:
                place, done = piece.place - pieces[0].place, 0
                while done < piece.n_bytes:
                    room = memory[place + done : place + piece.n_bytes]
                    count = os.preadv(self._files[piece.path], [room], piece.start + done)
                    if count == 0:
                        raise InputError(f"`{piece.path}` became shorter while it was read")
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


def _chunks(pieces: Sequence[_Piece]) -> Iterable[list[_Piece]]:
    """Yield neighbouring pieces that together fill at most one chunk; larger pieces are cut."""
    chunk: list[_Piece] = []
    for piece in pieces:
        for offset in range(0, piece.n_bytes, CHUNK):
            part = _Piece(piece.path, piece.start + offset, min(CHUNK, piece.n_bytes - offset), piece.place + offset)
            if chunk and part.place + part.n_bytes - chunk[0].place > CHUNK:
                yield chunk
                chunk = []
            chunk.append(part)
    if chunk:
        yield chunk


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
