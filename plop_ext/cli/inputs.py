"""Hashes of what a command reads, by which a finished result is recognized."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

# Number and bytes of the blocks, evenly spread, that are read of a larger file: no two checkpoints agree in all.
_BLOCKS, _BLOCK = 1024, 1 << 16


class InputsHash:
    """The `inputs_hash` of a run, which can be taken on a thread while the run goes on.

    Args:
        model: As for `inputs_hash`.
        data: As for `inputs_hash`.
        options: As for `inputs_hash`.
    """

    def __init__(self, model: str, data: str, options: Mapping[str, Any]) -> None:
        self._hash = partial(inputs_hash, model, data, options)
        self._future: Future[str | None] | None = None

    def start(self) -> None:
        """Begin to take it, best when the files are in the file cache."""
        if self._future is None:
            pool = ThreadPoolExecutor(1, thread_name_prefix="plop-hash")
            self._future = pool.submit(self._hash)
            pool.shutdown(wait=False)

    def result(self) -> str | None:
        """Return it."""
        self.start()
        assert self._future is not None
        return self._future.result()


def inputs_hash(model: str, data: str, options: Mapping[str, Any]) -> str | None:
    """Return a hash of a model, of data, and of the options of a run; None if a file cannot be read.

    Files count by their contents, whatever they are called; names that are no paths, as of a model on the hub, count
    as names.
    """
    found = hashlib.sha256(json.dumps(dict(options), sort_keys=True, default=str).encode())
    for source in (model, data):
        files = _files(source)
        found.update(f"\0{'' if files else source}".encode(errors="surrogateescape"))
        for path in files:
            try:
                _add(found, path)
            except OSError:  # which loading reports
                return None
    return found.hexdigest()[:32]


def _files(source: str) -> list[Path]:
    """Return the files of a file or folder, in the order of their names; none if there is no such path."""
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return [path]
        return sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else []
    except (OSError, RuntimeError):  # which loading reports
        return []


def _add(found: Any, path: Path) -> None:
    """Add the contents of a file, or samples of them."""
    size = path.stat().st_size
    found.update(f"\0{size}\0".encode())
    with path.open("rb") as stream:
        if size <= _BLOCKS * _BLOCK:
            while block := stream.read(1 << 20):
                found.update(block)
            return
        for number in range(_BLOCKS):
            stream.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
            found.update(stream.read(_BLOCK))
