"""The properties of a batch that determine which kernels a forward launches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from plop_ext.collecting.transfer import overwrite


class Ungraphable(Exception):
    """A batch that cannot be captured; the message gives the reason."""


def launch_key(batch: Any) -> Hashable:
    """Return a key that is equal for batches that differ only in the values of their tensors.

    Raises:
        Ungraphable: If this cannot be determined, as for an object of an unknown class.
    """
    if isinstance(batch, Tensor):
        if batch.layout != torch.strided:
            raise Ungraphable(f"a batch holds a tensor of layout {batch.layout}")
        return batch.dtype, tuple(batch.shape), batch.stride()
    if isinstance(batch, Mapping):
        return tuple((name, launch_key(value)) for name, value in batch.items())
    if isinstance(batch, (tuple, list)):
        return tuple(map(launch_key, batch))
    if batch is None or isinstance(batch, (bool, int, float, str)):
        return type(batch), batch
    raise Ungraphable(f"a batch holds a {type(batch).__name__}, whose values cannot be compared")


def tensors(batch: Any) -> list[Tensor]:
    """Return all tensors of a batch, in the same order for batches of one `launch_key`."""
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def on_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with a new copy of each tensor on `device`."""
    if isinstance(batch, Tensor):
        copy = torch.empty_like(batch, device=device)
        overwrite(copy, batch)
        return copy
    if isinstance(batch, Mapping):
        return {name: on_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [on_device(value, device) for value in batch]
    return batch
