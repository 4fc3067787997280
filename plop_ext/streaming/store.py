"""The store of each batch's tensors between blocks: on the device, in RAM or on disk, whichever has room."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plop_ext.collecting.transfer import to_device
from plop_ext.files import writing
from plop_ext.streaming.weights import tensor_bytes

DEVICE, RAM, DISK = "device", "RAM", "disk"


@dataclass
class _Held:
    tier: str
    n_bytes: int
    tensors: list[Tensor] | None
    path: Path | None = None


class Store:
    """Lists of tensors by name.

    Args:
        device: Device of the tensors.
        device_room: Bytes that they may take on the device; on a CPU, in RAM.
        ram_room: Bytes that they may take in RAM; ignored on a CPU, where RAM is the device.
        folder: Parent of the folder for tensors on disk; None uses the system's folder for temporary files.

    Attributes:
        most: Peak bytes in each place so far.
    """

    def __init__(self, device: torch.device, device_room: int, ram_room: int, folder: Path | None = None) -> None:
        self._device = device
        self._room = {DEVICE: max(device_room, 0), RAM: 0 if device.type == "cpu" else max(ram_room, 0)}
        self._used = {DEVICE: 0, RAM: 0, DISK: 0}
        self._held: dict[str, _Held] = {}
        self._folder = folder
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self.most = dict(self._used)

    def put(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep `tensors` under `name`, and drop those kept before."""
        self.drop(name)
        n_bytes = tensor_bytes(tensors)
        tier = next((tier for tier, room in self._room.items() if self._used[tier] + n_bytes <= room), DISK)
        held = _Held(tier, n_bytes, list(tensors))
        if tier == RAM:
            held.tensors = [tensor.to("cpu") for tensor in tensors]
        elif tier == DISK:
            if self._files is None:
                self._files = tempfile.TemporaryDirectory(prefix="plop-stream-", dir=self._folder)
            held.path = Path(self._files.name) / f"{name}.pt"
            save_tensors(held.path, tensors)
            held.tensors = None
        self._held[name] = held
        self._used[tier] += n_bytes
        self.most[tier] = max(self.most[tier], self._used[tier])

    def get(self, name: str) -> list[Tensor]:
        """Return the tensors that `put` kept, on the device."""
        held = self._held[name]
        if held.path is not None:
            return load_tensors(held.path, self._device)
        assert held.tensors is not None
        return [to_device(tensor, self._device) for tensor in held.tensors]

    def drop(self, name: str) -> None:
        """Drop the tensors of `name`, if there are any."""
        held = self._held.pop(name, None)
        if held is not None:
            self._used[held.tier] -= held.n_bytes
            if held.path is not None:
                held.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Drop all tensors and remove the files."""
        self._held.clear()
        if self._files is not None:
            self._files.cleanup()
            self._files = None


def save_tensors(path: Path, tensors: Sequence[Tensor]) -> None:
    """Write `tensors` to `path`."""
    # Saving a view would write its whole storage.
    save_object(path, [tensor.to("cpu").clone(memory_format=torch.contiguous_format) for tensor in tensors])


def save_object(path: Path, content: Any) -> None:
    """Write what `torch.save` can to `path`.

    Raises:
        OutputError: If the system refuses, for instance because the disk is full.
    """
    with writing(path), path.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # in which torch wraps what the system refused
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def load_tensors(path: Path, device: torch.device) -> list[Tensor]:
    """Read tensors that `save_tensors` wrote."""
    tensors: list[Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return [to_device(tensor, device) for tensor in tensors]
