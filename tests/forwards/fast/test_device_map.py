"""Models that accelerate spreads over devices: its forwards move inputs, and the fused kernels run inside them."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import nn

from tests.support import fast_models
from tests.support.quiet import nfn, quietly

pytestmark = fast_models.needs_native


def spread(model: nn.Module, places: dict[str, Any]) -> nn.Module:
    copied: nn.Module = accelerate.dispatch_model(copy.deepcopy(model), device_map=places, force_hooks=True)
    return copied


def replaced(model: nn.Module) -> list[dict[str, Any]]:
    """What accelerate has put on each module."""
    return [{name: vars(module).get(name) for name in ("forward", "_old_forward")} for module in model.modules()]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_the_kernels_run_inside_accelerates_forwards(family: str) -> None:
    model = fast_models.make(family)
    expected = quietly(model, fast_models.batches(), fast=True)
    mapped = spread(model, {"": "cpu"})
    before = replaced(mapped)
    found = quietly(mapped, fast_models.batches(), fast=True)
    assert found.provenance["fast"] == expected.provenance["fast"] == {"blocks": 4, "reason": None}
    assert nfn(found) == nfn(expected)
    np.testing.assert_array_equal(found.totals.values, expected.totals.values)
    assert replaced(mapped) == before


@pytest.mark.filterwarnings("ignore:.*`fast`")
def test_another_forward_inside_is_left_alone() -> None:
    model: Any = spread(fast_models.make("llama"), {"": "cpu"})
    norm = model.layers[1].input_layernorm
    inner = norm._old_forward
    norm._old_forward = lambda x: 2 * inner(x)
    scores = quietly(model, fast_models.batches(), fast=True)
    assert scores.provenance["fast"]["blocks"] == 3
    assert "the forward of a LlamaRMSNorm has been replaced" in scores.provenance["fast"]["reason"]
    assert nfn(scores) == pytest.approx(nfn(quietly(model, fast_models.batches())), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*`fast`")
def test_offloaded_weights_decline() -> None:
    model = fast_models.make("llama")
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    scores = quietly(offloaded, fast_models.batches(), fast=True)
    assert scores.provenance["fast"]["blocks"] == 0
    assert nfn(scores) == pytest.approx(nfn(quietly(model, fast_models.batches())), rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_have_the_numbers_of_one() -> None:
    model = fast_models.make("llama", device="cuda:0")
    places = {
        "embed_tokens": 0,
        "rotary_emb": 0,
        "layers.0": 0,
        "layers.1": 0,
        "layers.2": 1,
        "layers.3": 1,
        "norm": 1,
    }
    expected = quietly(model, fast_models.batches(), fast=True)
    found = quietly(spread(model, places), fast_models.batches(), fast=True)
    assert found.provenance["fast"] == {"blocks": 4, "reason": None}
    assert nfn(found) == pytest.approx(nfn(expected), rel=fast_models.TOLERANCE[torch.float32])
