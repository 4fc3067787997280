"""The state of a streamed run on disk, from which another run continues at the last finished block."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plop_ext.errors import InputError
from plop_ext.files import make_folder, read_json, resolve, write_text_atomic, writing
from plop_ext.streaming.store import load_tensors, save_object, save_tensors

FORMAT = "plop_ext.streaming"
VERSION = 2
_FILE = "state.json"
# A state is written when a kill would cost more than the write: this many seconds of work, and this many times the
# seconds of the last write.
_SECONDS = 20.0
_TIMES = 10.0


class State:
    """A folder with the hidden states after a finished block, and the results of all blocks up to it.

    `state.json` is written last and atomically, so it never refers to a block with incomplete files. A block whose
    hidden states are not worth the write is recorded with the next one that is, or with the last.

    Args:
        folder: The folder, which is created if it does not exist.
        identity: Values that must be equal for a run to be continued.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        with writing(folder):
            resolve(folder)  # refuses what is no path
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))
        self._results: dict[int, dict[str, Any]] = {}
        self._written = time.monotonic()
        self._took = 0.0

    def open(self, resume: bool) -> int:
        """Take up the run that left the state, or begin a new one; return how many blocks are finished."""
        if resume:
            return self.finished()
        self.start()
        return 0

    def finished(self) -> int:
        """Return the number of finished blocks.

        Raises:
            InputError: If there is no state, or the state belongs to another run.
        """
        if not (self.folder / _FILE).is_file():
            raise InputError(f"`{self.folder}` holds no state of a streamed run; start without `resume`")
        content = read_json(self.folder / _FILE, FORMAT, VERSION, "a streamed run")
        for key, value in self._identity.items():
            if content["identity"].get(key) != value:
                raise InputError(
                    f"`{self.folder}` is the state of another run: its {key} differs; start without `resume`"
                )
        return int(content["finished"])

    def start(self) -> None:
        """Remove the state of an earlier run and create the folder.

        Raises:
            InputError: If the folder holds other files, or cannot be created.
        """
        remove(self.folder)
        try:
            self.folder.mkdir(exist_ok=True)
            if any(self.folder.iterdir()):
                raise InputError(f"`{self.folder}` is not empty and no state of a streamed run; name another folder")
            # Marks the folder as a state, also if the run is killed within its first block.
            self._declare(0)
        except OSError as error:
            raise InputError(f"cannot write the state folder `{self.folder}`: {error.strerror}") from error

    def is_due(self) -> bool:
        """Return whether the work since the last write is worth another."""
        return time.monotonic() - self._written >= max(_SECONDS, _TIMES * self._took)

    def save_hidden(
        self, block: int, batch: int, tensors: Sequence[Tensor], shared: Sequence[Mapping[Any, Any]]
    ) -> None:
        """Write the tensors and shared objects that batch number `batch` passes from `block` to the next block."""
        began = time.monotonic()
        folder = self._hidden_folder(block)
        make_folder(folder)
        save_tensors(folder / f"{batch}.pt", tensors)
        if shared:
            save_object(folder / f"{batch}-shared.pt", [dict(item) for item in shared])
        self._took = time.monotonic() - began + (self._took if batch else 0.0)

    def load_hidden(self, block: int, batch: int, device: torch.device) -> tuple[list[Tensor], list[dict[Any, Any]]]:
        """Read the tensors and shared objects that `save_hidden` wrote."""
        folder = self._hidden_folder(block)
        shared = folder / f"{batch}-shared.pt"
        return (
            load_tensors(folder / f"{batch}.pt", device),
            torch.load(shared, map_location=device, weights_only=True) if shared.is_file() else [],
        )

    def finish(self, block: int, result: dict[str, Any], written: bool) -> None:
        """Take the result of a block.

        Args:
            block: Number of the block.
            result: What `result` returns for it.
            written: Whether a run can continue after it: its hidden states were written, or it is the last.
        """
        self._results[block] = result
        if not written:
            return
        for number, found in self._results.items():
            save_object(self.folder / f"result-{number}.pt", found)
        self._results.clear()
        self._declare(block + 1)
        for folder in self.folder.glob("hidden-*"):
            if folder != self._hidden_folder(block):
                shutil.rmtree(folder, ignore_errors=True)
        self._written = time.monotonic()

    def _hidden_folder(self, block: int) -> Path:
        return self.folder / f"hidden-{block}"

    def _declare(self, finished: int) -> None:
        content = {"format": FORMAT, "version": VERSION, "identity": self._identity, "finished": finished}
        write_text_atomic(self.folder / _FILE, json.dumps(content, indent=1) + "\n")

    def result(self, block: int) -> dict[str, Any]:
        """Return the result that `finish` stored for a block."""
        return dict(torch.load(self.folder / f"result-{block}.pt", weights_only=True))


def remove(folder: Path) -> None:
    """Remove the state in `folder`, once its scores are saved; leave a folder without a state alone."""
    if (folder / _FILE).is_file():
        shutil.rmtree(folder, ignore_errors=True)
