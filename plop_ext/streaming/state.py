"""The state of a streamed run on disk, from which another run continues at the last finished block."""

from __future__ import annotations

import json
import shutil
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


class State:
    """A folder with the hidden states after the last finished block, and the results of all finished ones.

    `state.json` is written last and atomically, so it never refers to a block with incomplete files.

    Args:
        folder: The folder, which is created if it does not exist.
        identity: Values that must be equal for a run to be continued.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        with writing(folder):
            resolve(folder)  # refuses what is no path
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))

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

    def save_hidden(
        self, block: int, batch: int, tensors: Sequence[Tensor], shared: Sequence[Mapping[Any, Any]]
    ) -> None:
        """Write the tensors and shared objects that batch number `batch` passes from `block` to the next block."""
        folder = self.folder / f"hidden-{block}"
        make_folder(folder)
        save_tensors(folder / f"{batch}.pt", tensors)
        if shared:
            save_object(folder / f"{batch}-shared.pt", [dict(item) for item in shared])

    def load_hidden(self, block: int, batch: int, device: torch.device) -> tuple[list[Tensor], list[dict[Any, Any]]]:
        """Read the tensors and shared objects that `save_hidden` wrote."""
        folder = self.folder / f"hidden-{block}"
        shared = folder / f"{batch}-shared.pt"
        return (
            load_tensors(folder / f"{batch}.pt", device),
            torch.load(shared, map_location=device, weights_only=True) if shared.is_file() else [],
        )

    def finish(self, block: int, result: dict[str, Any]) -> None:
        """Record `block` as finished, after its hidden states were written."""
        save_object(self.folder / f"result-{block}.pt", result)
        self._declare(block + 1)
        shutil.rmtree(self.folder / f"hidden-{block - 1}", ignore_errors=True)

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
