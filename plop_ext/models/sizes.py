"""The sizes in config.json, checked against the checkpoint's files and the memory before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from plop_ext import memory
from plop_ext.errors import InputError
from plop_ext.models.checkpoint import TensorEntry

# Fewer layers or experts than this take no time to build.
_FEW = 2000
_COUNTS = ("layer", "block", "expert", "depth")
# No format stores a weight in less than a bit.
_WEIGHTS_PER_BYTE = 8


def check_counts(name: str, config: Any, stored: Mapping[str, TensorEntry]) -> None:
    """Check that config.json asks for no more layers and experts than the files can hold, which take time to build.

    Raises:
        InputError: If it does; the message names the field.
    """
    for part in (config, config.get_text_config(decoder=True)):
        for field, value in part.to_dict().items():
            counts = isinstance(value, int) and any(word in field for word in _COUNTS)
            if counts and value > max(_FEW, len(stored)):
                held = f"the checkpoint holds {len(stored)} tensors" if stored else "no model has as many"
                raise InputError(
                    f"`name_or_path` {name!r}: config.json asks for {field}={value}, and {held}; download it again"
                )


def check_files(name: str, model: Any, stored: Mapping[str, TensorEntry]) -> None:
    """Check that the files can hold the weights of a model, which is on the meta device.

    Raises:
        InputError: If they cannot.
    """
    held = sum(entry.n_bytes for entry in stored.values())
    wanted = _weights(model)
    if stored and wanted > held * _WEIGHTS_PER_BYTE:
        raise InputError(
            f"`name_or_path` {name!r}: config.json describes a model of {wanted:,} weights, and the checkpoint's files"
            f" hold {memory.format_size(held)}; download config.json or the files again"
        )


class DoesNotFit(InputError):
    """A model whose weights exceed the memory of a device, however much of it is free."""


def check_memory(name: str, needed: int, device: torch.device) -> None:
    """Check that `needed` bytes are free on a device.

    Raises:
        DoesNotFit: If the device has less.
        InputError: If less is free.
    """
    free, total = _memory(device)
    if needed > free:
        kind = DoesNotFit if needed > total else InputError
        raise kind(
            f"`name_or_path` {name!r} takes {memory.format_size(needed)} of memory, and {memory.format_size(free)} are"
            f" free on {device}; choose another `device` or `dtype`, or score it block by block (`plop score --stream`"
            " or `plop_ext.score_streaming`)"
        )


def loaded_bytes(model: Any, dtype: torch.dtype) -> int:
    """Return the memory of the weights of a model in one type."""
    return _weights(model) * dtype.itemsize


def _weights(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _memory(device: torch.device) -> tuple[float, float]:
    """Return the free and all memory of a device; infinity if it cannot tell."""
    if device.type == "cpu":
        return memory.available_ram(), memory.total_ram()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    return math.inf, math.inf
