"""Reads the weights of a model into the system's file cache while Python still imports the libraries that load them.

Nothing depends on it: whoever loads the weights reads the files as ever, and finds them in memory.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from plop_ext import memory

_READERS = 8
# A reader takes Python's lock once in a chunk, so that the imports are not held up; it reads into one small buffer.
_CHUNK = 64 << 20
_BUFFER = 4 << 20
# Positions of a chunk at which is looked whether it is in memory already.
_PROBES = 4
# Share of the available memory that may be filled: what is read too early would be dropped before its use.
_SHARE = 0.5
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

_folders: set[str] = set()


@contextmanager
def reading_ahead(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Read the weights of a model folder in the background, until the end of the block at most.

    Args:
        folder: Folder of a model. Anything else, a damaged folder included, is left to the loader. Within the block,
            a second call for the same folder does nothing.
    """
    name = os.path.abspath(os.fspath(folder))
    if name in _folders:
        yield
        return
    _folders.add(name)
    ended = threading.Event()
    try:
        _start(weight_files(Path(name)), ended)
        yield
    finally:
        ended.set()
        _folders.discard(name)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that a loader of the folder reads, in order; none if they cannot be told."""
    try:
        if (folder / _SINGLE).is_file():
            return [folder / _SINGLE]
        names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _start(files: list[Path], ended: threading.Event) -> None:
    """Start the threads, which end with the files, with `ended`, or with the process."""
    chunks = _Chunks(files, int(memory.available_ram() * _SHARE))
    with suppress(RuntimeError):  # no thread can be started
        for _ in range(min(_READERS, chunks.count)):
            threading.Thread(target=_read, args=(chunks, ended), name="plop-read-ahead", daemon=True).start()


class _Chunks:
    """The chunks of files in order, for several threads; `count` is their number."""

    def __init__(self, files: list[Path], most: int) -> None:
        self._lock = threading.Lock()
        places = []
        for path in files:
            try:
                size = path.stat().st_size
            except (OSError, ValueError):  # the index names what is no path
                break
            places += [(path, start, min(_CHUNK, size - start)) for start in range(0, size, _CHUNK)]
        places = places[: most // _CHUNK]
        self.count = len(places)
        self._left = iter(places)

    def next(self) -> tuple[Path, int, int] | None:
        with self._lock:
            return next(self._left, None)


def _read(chunks: _Chunks, ended: threading.Event) -> None:
    buffer = memoryview(bytearray(_BUFFER))
    while not ended.is_set() and (chunk := chunks.next()) is not None:
        path, start, size = chunk
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return
        try:
            if not _is_cached(descriptor, start, size):
                whole, rest = divmod(size, _BUFFER)
                os.preadv(descriptor, [*[buffer] * whole, buffer[:rest]], start)
        except OSError:
            return
        finally:
            os.close(descriptor)


def _is_cached(descriptor: int, start: int, size: int) -> bool:
    """Return whether all of a few bytes of a chunk can be read without the disk."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    byte = bytearray(1)
    try:
        return all(
            os.preadv(descriptor, [byte], start + size * probe // _PROBES, os.RWF_NOWAIT) == 1
            for probe in range(_PROBES)
        )
    except OSError:  # not in memory, or a file system that cannot tell
        return False
