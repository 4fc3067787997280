"""The audit of `gated_projection_` in a run: in which batches and blocks it is compared, and what it finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plop_ext import ops
from plop_ext.forwards.fast import kernels
from tests.support.fast_models import TOLERANCE, batches, make, needs_native
from tests.support.projection import compared
from tests.support.quiet import quietly

pytestmark = needs_native


def wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the op computes something else."""
    counted = ops.gated_projection_

    def wrong(**arguments: Any) -> None:
        counted(**arguments)
        arguments["out"].mul_(1.5)

    monkeypatch.setattr(ops, "gated_projection_", wrong)


def growing() -> list[dict[str, Tensor]]:
    """The first batch has 12 tokens, the others 36."""
    return batches(1, samples=1) + batches(3)


def test_a_later_batch_that_wants_the_kernel_is_checked_too(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, projections: list[int]
) -> None:
    monkeypatch.setattr(kernels, "_PROJECTED_ROWS", 36)
    model = make("llama", torch.bfloat16, device)
    compared(model, growing(), projections, 0 + 0 + 2 + 4)  # wanted by the second, compared in the third
    wrongly(monkeypatch)
    projections.clear()
    with pytest.warns(UserWarning, match="a row of gated_projection is off"):
        fast = quietly(model, growing(), fast=True)
    assert len(projections) == 2
    np.testing.assert_allclose(fast.totals, quietly(model, growing()).totals, rtol=2 * TOLERANCE[torch.bfloat16])


def test_blocks_between_those_that_are_compared(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, projections: list[int]
) -> None:
    import peft

    model = make("llama", torch.bfloat16, device)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*layers\.[03]\.mlp\.gate_proj"))
    compared(model, batches(), projections, 1 + 2)  # the first of the others is compared as well
    wrongly(monkeypatch)
    with pytest.warns(UserWarning, match="a row of gated_projection is off"):
        fast = quietly(model, batches(), fast=True)
    np.testing.assert_array_equal(fast.totals, quietly(model, batches()).totals)


def test_a_kernel_that_never_becomes_eligible_is_not_checked_for_ever(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, projections: list[int]
) -> None:
    monkeypatch.setattr(kernels, "_PROJECTED_ROWS", 36)
    model, small, large = make("llama", torch.bfloat16, device), batches(1, samples=1), batches(1)
    compared(model, (small + large) * 8, projections, 0)  # wanted by each large batch; the small ones are checked


@pytest.mark.parametrize("result", ["out", "gate_sumsq", "up_sumsq", "out_sumsq"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_kernel_that_computes_something_else_is_found_and_not_used(
    family: str, result: str, monkeypatch: pytest.MonkeyPatch, device: torch.device, projections: list[int]
) -> None:
    model, data = make(family, torch.bfloat16, device), batches()
    counted = ops.gated_projection_

    def wrong(**arguments: Any) -> None:
        counted(**arguments)
        arguments[result].mul_(1.1)

    monkeypatch.setattr(ops, "gated_projection_", wrong)
    with pytest.warns(
        UserWarning, match="the fused kernels disagree with the model: a row of gated_projection is off"
    ):
        fast = quietly(model, data, fast=True)
    assert fast.provenance["fast"]["blocks"] == 0
    np.testing.assert_array_equal(fast.totals, quietly(model, data).totals)
