"""The fast path where gate and up are never made: its scores and hidden states are those of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext import Collector, ops
from plop_ext.forwards.fast import FastPath, kernels
from plop_ext.layers import discover
from tests.support.fast_models import TOLERANCE, batches, hidden_states, make, needs_native
from tests.support.model_state import assert_unchanged, state
from tests.support.projection import CALLS, CALLS_OF_TWO_KINDS, WITHOUT_BIAS, agreed, compared, observed
from tests.support.quiet import quietly
from tests.support.totals import assert_close

pytestmark = needs_native


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("token_step", [1, 5])
@pytest.mark.parametrize("family", WITHOUT_BIAS)
def test_scores_are_those_of_the_hooks(
    family: str, token_step: int, dtype: torch.dtype, device: torch.device, projections: list[int]
) -> None:
    model, data = make(family, dtype, device), batches()
    expected = CALLS_OF_TWO_KINDS if family == "gemma2" else CALLS
    compared(model, data, projections, expected, 2 * TOLERANCE[dtype], token_step=token_step, seed=3)


@pytest.mark.parametrize("family", WITHOUT_BIAS)
def test_hidden_states_are_those_of_the_model(family: str, device: torch.device, projections: list[int]) -> None:
    model, batch = make(family, torch.bfloat16, device), batches(1)[0]
    expected = hidden_states(model, batch, device)
    with Collector(model, discover(model).layers) as collector, agreed(FastPath(model, collector)):
        found = hidden_states(model, batch, device)  # of no batch that counts
    assert len(projections) == 4
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours.float() - theirs.float()).norm(dim=-1) / theirs.float().norm(dim=-1)
        assert error.max() < 0.02


@pytest.mark.parametrize(
    "family, names", [("llama", ["gate_proj"]), ("llama", ["up_proj", "q_proj"]), ("phi3", ["o_proj"])]
)
def test_some_or_none_of_its_layers_scored(
    family: str, names: list[str], device: torch.device, projections: list[int]
) -> None:
    model, batch = make(family, torch.bfloat16, device), batches(1)[0]
    layers = [layer for layer in discover(model).layers if layer.name.split(".")[-1] in names]
    assert layers
    plain, fast = (
        observed(model, layers, batch, device, fast, mask=batch["attention_mask"].bool()) for fast in (False, True)
    )
    assert len(projections) == 4
    assert_close(fast.totals(), plain.totals(), rtol=2 * TOLERANCE[torch.bfloat16])


def test_only_v_and_the_output_of_attention_are_read(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, projections: list[int]
) -> None:
    model, batch = make("llama", torch.bfloat16, device), batches(1, padded=False)[0]
    read: list[int] = []
    single, both = ops.row_sumsq_, ops.row_sumsq_pair_

    def counting(out: Tensor, x: Tensor, *args: Any) -> None:
        read.append(x.shape[-1])
        single(out, x, *args)

    def counting_both(out: Tensor, x: Tensor, y: Tensor, *args: Any) -> None:
        read.extend((x.shape[-1], y.shape[-1]))
        both(out, x, y, *args)

    monkeypatch.setattr(ops, "row_sumsq_", counting)
    monkeypatch.setattr(ops, "row_sumsq_pair_", counting_both)
    with Collector(model, discover(model).layers) as collector, agreed(FastPath(model, collector)):
        collector.begin(3)
        hidden_states(model, batch, device)
        collector.end()
    assert sorted(read) == [64] * 4 + [128] * 4
    assert len(projections) == 4


@pytest.mark.parametrize("vectors", [3, 5, 13])
def test_a_full_arena(
    vectors: int, monkeypatch: pytest.MonkeyPatch, device: torch.device, projections: list[int]
) -> None:
    monkeypatch.setattr("plop_ext.collecting.arena._ARENA_ELEMENTS", vectors * 36)
    compared(make("qwen3", torch.bfloat16, device), batches(), projections, CALLS)


def test_a_block_used_twice(device: torch.device, projections: list[int]) -> None:
    model = make("llama", torch.bfloat16, device)
    model.layers[3] = model.layers[0]  # type: ignore[index, operator]
    compared(model, batches(), projections, CALLS)


def test_layers_shared_by_blocks(device: torch.device, projections: list[int]) -> None:
    model: Any = make("llama", torch.bfloat16, device)
    model.layers[1].mlp.up_proj = model.layers[0].mlp.up_proj
    model.layers[2].mlp.gate_proj = model.layers[0].mlp.up_proj
    compared(model, batches(), projections, CALLS)


def test_a_layer_called_before_the_model(device: torch.device, projections: list[int]) -> None:
    model = make("llama", torch.bfloat16, device)
    up_proj = model.get_submodule("layers.1.mlp.up_proj")

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        up_proj(torch.ones(3, 12, 64, dtype=torch.bfloat16, device=device))
        model(**batch, use_cache=False)

    compared(model, batches(), projections, CALLS, forward=forward)


def test_the_model_is_restored(device: torch.device, projections: list[int]) -> None:
    model = make("phi3", torch.bfloat16, device)
    before = state(model)
    quietly(model, batches(), fast=True)
    assert len(projections) == CALLS
    assert_unchanged(before, model)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_in_a_cuda_graph(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    if not ops.has_gated_projection(device):
        pytest.skip("there is no kernel for this device's compute capability")
    monkeypatch.setattr(kernels, "_PROJECTED_ROWS", 1)
    model, data = make(family, torch.bfloat16, device), batches(4)
    eager = quietly(model, data, fast=True)
    graph = quietly(model, data, fast=True, graph=True)
    assert graph.provenance["fast"]["blocks"] == 4
    assert graph.provenance["graph"]["replayed"] > 0
    np.testing.assert_allclose(graph.totals, eager.totals, rtol=1e-6)


@pytest.mark.gpu
def test_a_large_batch_takes_it_by_itself() -> None:
    device = torch.device("cuda")
    model = make("llama", torch.bfloat16, device)
    data = batches(2, samples=64, tokens=8, padded=False)  # 512 tokens
    with torch.profiler.profile() as profile:
        scores = plop_ext.score(model, data, progress=False, max_samples=None, fast=True)
    assert scores.provenance["fast"] == {"blocks": 4, "reason": None}
    names = {event.key for event in profile.key_averages()}
    assert any("gated_projection_kernel" in name for name in names) == ops.has_gated_projection(device)
