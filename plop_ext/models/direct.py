"""Weights straight from safetensors files to a CUDA device, through pinned memory, for plain checkpoints.

transformers copies each tensor from a memory map, page by page. Here it receives the tensors on the device already, as
the `state_dict` of `from_pretrained`: names, types and ties are its business as ever. Only a checkpoint of which it is
certain that nothing is converted is read in this way; `suits` decides before a byte of the weights is read.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from plop_ext.models.checkpoint import TensorEntry
from plop_ext.models.reader import Pending, Reader


def suits(model: Any, stored: Mapping[str, TensorEntry], dtype: str | torch.dtype) -> bool:
    """Return whether a checkpoint holds the model's own tensors: by name, shape and type, in safetensors files.

    Args:
        model: The model, on the meta device.
        stored: The tensors of the checkpoint, which declares no quantization.
        dtype: The type to load, or `"auto"` for the type in the model's configuration.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    config = model.config
    wanted = getattr(config, "dtype", None) if dtype == "auto" else dtype
    own_files = getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", ())
    if not isinstance(wanted, torch.dtype) or own_files or is_deepspeed_zero3_enabled():
        return False
    names = model.state_dict()
    return bool(stored) and all(
        entry.code and entry.dtype == wanted and key in names and names[key].shape == entry.shape
        for key, entry in stored.items()
    )


class DirectWeights:
    """Context manager that reads the tensors of a checkpoint to a device while the model is being built.

    Until the first tensor is asked for, only pinned memory is filled: transformers reserves the memory of the device.

    Args:
        stored: The tensors.
        reader: Reader to the device; it is closed with this context.

    Attributes:
        state_dict: The tensors by key, each with the interface of a slice of a safetensors file.
    """

    def __init__(self, stored: Mapping[str, TensorEntry], reader: Reader) -> None:
        self._stored = stored
        self._reader = reader
        self._targets: dict[str, Tensor] = {}
        self._writable = threading.Event()
        self._lock = threading.Lock()
        self._pending: Pending | None = None
        self._failure: BaseException | None = None
        self.state_dict = {key: _Stored(self, entry) for key, entry in stored.items()}

    def __enter__(self) -> DirectWeights:
        self._pending = self._reader.begin(list(self._stored.values()), self._targets, self._writable)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close(self._writable)
        if self._failure is not None:  # which transformers reports in its own words
            raise self._failure

    def tensor(self, key: str) -> Tensor:
        """Return a tensor on the device, once its bytes are there."""
        assert self._pending is not None
        try:
            with self._lock:
                if not self._writable.is_set():
                    self._allocate()
            for chunk in self._pending.of_key[key]:
                chunk.result()
            if self._reader.stream is not None:
                self._reader.stream.synchronize()
        except BaseException as error:
            self._failure = error
            raise
        return self._targets[key]

    def _allocate(self) -> None:
        """Allocate each tensor by itself, as transformers does, so that it can be freed by itself."""
        device = self._reader.device
        for key, entry in self._stored.items():
            self._targets[key] = torch.empty(entry.shape, dtype=cast(torch.dtype, entry.dtype), device=device)
        if self._reader.stream is not None:  # the memory may have been freed by work that is still queued
            self._reader.stream.wait_stream(torch.cuda.current_stream(device))
        self._writable.set()


class _Stored:
    """A tensor of the checkpoint, with the interface of a slice of a safetensors file."""

    def __init__(self, weights: DirectWeights, entry: TensorEntry) -> None:
        self._weights = weights
        self._entry = entry

    def __getitem__(self, index: Any) -> Tensor:
        return self._weights.tensor(self._entry.key)[index]

    def get_dtype(self) -> str:
        return self._entry.code

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)


class EarlyReader:
    """Context manager that makes a CUDA device and a reader to it ready on a thread, while others import and check.

    Args:
        device: The device; for any other than a CUDA device nothing is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._reader: Future[Reader] | None = None
        self._taken = False
        if device.type == "cuda":
            index = device.index
            if index is None:  # the thread's own current device may be another
                index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="plop-device")
            self._reader = self._pool.submit(Reader, torch.device("cuda", index))

    def __enter__(self) -> EarlyReader:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._reader is not None:
            self._pool.shutdown(wait=True)
            if not self._taken and self._reader.exception() is None:
                self._reader.result().close()

    def take(self) -> Reader | None:
        """Return the reader, which the caller closes; None for a device without one."""
        if self._reader is None:
            return None
        reader = self._reader.result()
        self._taken = True
        return reader
