"""Copies between host and device without synchronization."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move `tensor`; to CUDA through pinned memory, because a copy from pageable memory may synchronize.

    A copy to the host synchronizes, because the host reads it next.
    """
    if tensor.device.type == "cpu" and device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.contiguous().pin_memory()  # an expanded tensor cannot be pinned
    return tensor.to(device, non_blocking=device.type == "cuda")


def overwrite(target: Tensor, source: Tensor) -> None:
    """Copy `source` to the memory of `target`; to CUDA through pinned memory, as `to_device` does."""
    if source.device.type == "cpu" and target.device.type == "cuda" and not source.is_pinned():
        source = source.pin_memory()
    target.copy_(source, non_blocking=target.device.type == "cuda")
