"""Copies between host and device that make nobody wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move `tensor`; towards CUDA through pinned memory, since a copy from pageable memory can make the host wait.

    Towards the host it does wait: what is read there next must have arrived.
    """
    if tensor.device.type == "cpu" and device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")
