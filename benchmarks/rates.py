"""What the device itself does: bytes per second of a copy, operations per second of a matrix product."""

from __future__ import annotations

import torch

from benchmarks.timing import Candidate, measure, summarize


def copy_gb_per_s(device: torch.device, n_bytes: int) -> float:
    """Return the bytes read plus bytes written per second by a device-to-device copy."""
    source, target = (torch.randint(-128, 127, (n_bytes,), dtype=torch.int8, device=device) for _ in range(2))
    seconds = measure([Candidate("copy", lambda _: target.copy_(source), queued=True)], device, rounds=20, warmup=3)
    return 2 * n_bytes / summarize(seconds["copy"]).median / 1e9


def matmul_tflop_per_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """1e12 operations per second of a product of two random [size, size] matrices."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = measure(
        [Candidate("product", lambda _: torch.mm(left, right, out=out), queued=True)], device, rounds=20, warmup=3
    )
    return 2 * size**3 / summarize(seconds["product"]).median / 1e12
