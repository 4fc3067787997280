"""The rates of disk, copy and matrix product on this machine, which limit a streamed run."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from plop_ext.memory import MIB
from plop_ext.models.checkpoint import TensorEntry
from plop_ext.models.reader import CHUNK, Reader
from plop_ext.streaming.plan import Plan

_PROBE_FILE = 256 * MIB


@dataclass(frozen=True)
class Rates:
    """Measured rates.

    Attributes:
        disk: Bytes per second read from the disk, not from the page cache.
        to_device: Bytes per second copied from pinned memory to the device; None on a CPU.
        flops: Floating-point operations per second of a large matrix product.
    """

    disk: float
    to_device: float | None
    flops: float

    def seconds(self, plan: Plan) -> dict[str, float]:
        """Return the seconds of disk, copy and compute alone; they overlap, so the slowest determines the run."""
        parts = {"disk": plan.read / self.disk, "compute": plan.flops / self.flops}
        if self.to_device is not None:
            parts["copy to device"] = plan.read / self.to_device
        return parts


def measure(device: torch.device, dtype: torch.dtype, files: Sequence[Path]) -> Rates:
    """Measure the rates in a few seconds.

    Args:
        device: Device of the run.
        dtype: Type of the weights.
        files: Files of the checkpoint; without files, a temporary file of 256 MiB is read instead.
    """
    return Rates(_disk(files), to_device_rate(device), _flops(device, dtype))


def forget_cached(paths: Sequence[Path]) -> None:
    """Ask the system to drop these files from the page cache, so that the next read is from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_rate(path: Path, n_bytes: int) -> float:
    """Return the bytes per second at which the first `n_bytes` of a file are read, as in a streamed run."""
    forget_cached([path])
    reader, buffer = Reader(torch.device("cpu")), torch.empty(n_bytes, dtype=torch.uint8)
    try:
        entry = TensorEntry("", path, 0, n_bytes, torch.uint8, "U8", (n_bytes,))
        buffer.zero_()  # page faults of the first write do not belong to the disk's time
        reader.read([entry], buffer)
        return n_bytes / reader.seconds
    finally:
        reader.close()


def to_device_rate(device: torch.device) -> float | None:
    """Return the bytes per second from pinned memory to the device."""
    if device.type != "cuda":
        return None
    source = torch.empty(8 * CHUNK, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return source.numel() / _best(lambda: target.copy_(source, non_blocking=True), device)


def _disk(files: Sequence[Path]) -> float:
    if files:
        path = max(files, key=lambda path: path.stat().st_size)
        return read_rate(path, min(path.stat().st_size, 4 * _PROBE_FILE))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe"
        path.write_bytes(os.urandom(16 * MIB) * (_PROBE_FILE // (16 * MIB)))
        return read_rate(path, _PROBE_FILE)


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of a few timings."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
