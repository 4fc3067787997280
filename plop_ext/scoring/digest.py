"""Fingerprints of data, by which a resumed run recognizes its batches and scores record their data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def digest(batch: Any) -> str:
    """Return a fingerprint of all tensors in a batch."""
    state = hashlib.blake2b(digest_size=16)
    _hash(batch, state)
    return state.hexdigest()


def data_hash(digests: Sequence[str]) -> str:
    """Return a fingerprint of all batches of a run, from their fingerprints."""
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def on_host(batch: Any) -> bool:
    """Return whether a fingerprint of the batch needs no synchronization."""
    if isinstance(batch, Tensor):
        return batch.device.type == "cpu" and batch.layout == torch.strided
    if isinstance(batch, Mapping):
        return all(map(on_host, batch.values()))
    return not isinstance(batch, (tuple, list)) or all(map(on_host, batch))


def _hash(value: Any, state: Any) -> None:
    if isinstance(value, Tensor):
        state.update(f"{value.dtype}{list(value.shape)}".encode())
        state.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            state.update(str(key).encode())
            _hash(value[key], state)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _hash(item, state)
