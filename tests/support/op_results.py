"""How close the outputs and sums of an op must be to what is expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SUMS = 1e-5  # as for `row_sumsq_`; one lost element of 16384 is six times that


def within(actual: Tensor, expected: Tensor, bound: Tensor, name: str = "output") -> None:
    """Elementwise |actual - expected| <= bound, and one step of the dtype's smallest numbers for its underflow."""
    info = torch.finfo(actual.dtype)
    excess = (actual.cpu().double() - expected).abs() - bound - 2 * info.smallest_normal * info.eps
    assert (excess <= 0).all(), f"{name}: {int((excess > 0).sum())} of {excess.numel()}, most by {float(excess.max())}"


def roundoff(dtype: torch.dtype) -> float:
    """Most that one rounding changes a number by, relatively."""
    return torch.finfo(dtype).eps / 2


def sums_are(actual: Tensor, values: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0) -> None:
    rows = values.detach().cpu().double().reshape(len(values), -1)
    rows = rows if bias is None else rows - bias.cpu().double()
    torch.testing.assert_close(actual.cpu().double(), rows.square().sum(1)[phase::step], rtol=SUMS, atol=0)


def same_bits(actual: Any, expected: Any) -> None:
    for name, tensor in expected._asdict().items():
        assert torch.equal(getattr(actual, name), tensor), name
