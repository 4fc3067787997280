"""Hashes by which a run that continues recognizes its model."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from plop_ext.provenance import describe_model

# Values of each tensor that are hashed. Two checkpoints differ in nearly all values of nearly all tensors.
_VALUES = 256


def identity(model: nn.Module) -> dict[str, Any]:
    """Return class, size and type of a model, and a hash of evenly spaced values of every weight and buffer."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta" and tensor.layout == torch.strided and tensor.numel():
            step = max(1, tensor.numel() // _VALUES)
            values = tensor.detach().reshape(-1)[::step].cpu().contiguous()
            state.update(values.view(torch.uint8).numpy().tobytes())
    described = describe_model(model)
    return {key: described[key] for key in ("class", "type", "parameters", "dtype")} | {"weights": state.hexdigest()}
