"""The hash of what a command reads, by which a finished result is recognized."""

from __future__ import annotations

import argparse
import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from plop_ext.cli.options import messages
from plop_ext.errors import InputError

# What no number of a result depends on; any other option makes another result.
_OUTPUTS = ("output", "heatmap", "plot", "force", "resume", "json", "quiet", "verbose")
_OTHERS = ("command", "run", "words", "config", "dry_run", "memory_budget", "trust_remote_code", "parallel")
# What main adds.
_ADDED = ("alone", "in_ranks", "launch", "load")
# Number and bytes of the blocks, evenly spread, that are read of a larger file of weights: no two checkpoints agree in
# all of them. Rows of data may differ anywhere, so all other files are read whole.
_BLOCKS, _BLOCK = 1024, 1 << 16
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class InputsHash:
    """The `inputs_hash` of a run, which can be taken on a thread while the run goes on.

    Args:
        args: As for `inputs_hash`.
        sources: As for `inputs_hash`.
    """

    def __init__(self, args: argparse.Namespace, *sources: str) -> None:
        # A copy: what a run decides later is no part of what was asked for.
        self._hash = partial(inputs_hash, argparse.Namespace(**vars(args)), *sources)
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


def inputs_hash(args: argparse.Namespace, *sources: str) -> str | None:
    """Return a hash of the options of a command and of the files that it reads; None if one cannot be read.

    Files count by their contents, whatever they are called; names that are no paths, as of a model on the hub, count
    as names.

    Args:
        args: The command line.
        sources: Options that name files, folders, or models and data on the hub.
    """
    options = {
        name: value for name, value in vars(args).items() if name not in (*_OUTPUTS, *_OTHERS, *_ADDED, *sources)
    }
    found = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for source in (str(getattr(args, name)) for name in sources):
        files = _files(source)
        found.update(f"\0{'' if files else source}".encode(errors="surrogateescape"))
        for path in files:
            try:
                _add(found, path)
            except OSError:  # which loading reports
                return None
    return found.hexdigest()[:32]


def check_same(output: str, found: str | None, inputs: str | None) -> None:
    """Check that the finished result at `output` is of these inputs, so that --resume can leave it unchanged.

    Args:
        output: The file.
        found: Hash of the inputs that it was made from, or None if it is unknown.
        inputs: Hash of the inputs of this command.

    Raises:
        InputError: If it is of others.
    """
    if inputs is None or found != inputs:
        raise InputError(
            f"`--output` {output} was made from other inputs (another model, other data or options); add --force to"
            " replace it, or name another file"
        )


def say_finished(output: str) -> None:
    """Say that a finished result is not changed."""
    messages.print(f"{output} is finished and of the same inputs; nothing to do")


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
    """Add the contents of a file, or samples of those of large weights."""
    size = path.stat().st_size
    found.update(f"\0{size}\0".encode())
    with path.open("rb") as stream:
        if size <= _BLOCKS * _BLOCK or path.suffix not in _WEIGHTS:
            while block := stream.read(1 << 20):
                found.update(block)
            return
        for number in range(_BLOCKS):
            stream.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
            found.update(stream.read(_BLOCK))
