"""Runs the fast path on models and batches so small that it would leave `gated_projection_` alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext import Collector, ops
from plop_ext.forwards.fast import FastPath, kernels
from plop_ext.layers import LinearLayer
from tests.support.fast_models import FAMILIES, TOLERANCE, hidden_states
from tests.support.quiet import quietly
from tests.support.totals import assert_close

WITHOUT_BIAS = [family for family in FAMILIES if family != "llama_biased"]

# Calls in two batches of a model of four blocks: in the first one, which is checked, blocks that are compared take the
# kernel, the first and the last of each kind; then all do.
CALLS = 2 + 4
CALLS_OF_TWO_KINDS = 4 + 4


@pytest.fixture
def projections(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[int]:
    """Calls of the op, which small batches take too, and the CPU with its PyTorch kernel."""
    if device.type == "cuda" and not ops.has_gated_projection(device):
        pytest.skip("there is no kernel for this device's compute capability")
    made: list[int] = []
    original = ops.gated_projection_

    def counting(**arguments: Any) -> None:
        made.append(len(arguments["out"]))
        original(**arguments)

    monkeypatch.setattr(ops, "gated_projection_", counting)
    monkeypatch.setattr(ops, "has_gated_projection", lambda device: True)
    monkeypatch.setattr(kernels, "_PROJECTED_ROWS", 1)
    return made


def compared(
    model: nn.Module,
    data: list[Any],
    calls: list[int],
    expected: int,
    rtol: float = TOLERANCE[torch.bfloat16],
    **kwargs: Any,
) -> None:
    """The fast path scores as hooks do, with this number of calls of the op."""
    plain = quietly(model, data, **kwargs)
    calls.clear()
    fast = quietly(model, data, fast=True, **kwargs)
    assert len(calls) == expected
    assert [module.name for module in fast.modules] == [module.name for module in plain.modules]
    assert_close(fast.totals, plain.totals, rtol=rtol)


def agreed(path: FastPath) -> FastPath:
    """As after a batch that was checked."""
    path._projections.agreed = True
    return path


def observed(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    batch: dict[str, Tensor],
    device: torch.device,
    fast: bool,
    *,
    samples: int = 3,
    mask: Tensor | None = None,
    last_call_only: bool = False,
) -> Collector:
    """The collector of one forward, by hooks or by the fast path."""
    with Collector(model, layers, last_call_only=last_call_only) as collector:
        with agreed(FastPath(model, collector)) if fast else nullcontext():
            collector.begin(samples, mask)
            hidden_states(model, batch, device)
            collector.end()
    return collector
