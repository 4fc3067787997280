"""The fast path: same scores and outputs as without it, on every family; nothing left behind; stands aside in time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext import Collector, ops
from plop_ext.forwards.fast import FastPath
from plop_ext.layers import discover
from tests.support.fast_models import FAMILIES, TOLERANCE, batches, hidden_states, make, needs_native
from tests.support.model_state import assert_unchanged, state
from tests.support.quiet import quietly
from tests.support.totals import assert_close

pytestmark = needs_native


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_hooks(family: str, dtype: torch.dtype, device: torch.device) -> None:
    model, data = make(family, dtype, device), batches()
    plain = quietly(model, data)
    fast = quietly(model, data, fast=True)
    assert fast.provenance["fast"] == {"blocks": 4, "reason": None}
    assert [module.name for module in fast.modules] == [module.name for module in plain.modules]
    assert_close(fast.totals, plain.totals, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_of_every_block_is_that_of_the_model(family: str, device: torch.device) -> None:
    model, batch = make(family, device=device), batches(1)[0]
    expected = hidden_states(model, batch, device)
    with Collector(model, discover(model).layers) as collector, FastPath(model, collector) as path:
        assert path.blocks == 4
        found = hidden_states(model, batch, device)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        # Rows of padding too: they go through the same kernels.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "llama_biased"])
def test_every_nth_token_is_the_same_token(family: str, device: torch.device) -> None:
    model, data = make(family, device=device), batches(3, padded=False)
    plain = quietly(model, data, token_step=5, seed=3)
    fast = quietly(model, data, token_step=5, seed=3, fast=True)
    assert_close(fast.totals, plain.totals, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "llama_biased"])
def test_the_generic_kernel_reads_nothing_that_a_fused_kernel_has_read(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make(family), batches(1, padded=False)[0]
    read: list[int] = []
    original, original_pair = ops.row_sumsq_, ops.row_sumsq_pair_

    def counting(out: Tensor, x: Tensor, *args: Any) -> None:
        read.append(x.shape[-1])
        original(out, x, *args)

    def counting_both(out: Tensor, x: Tensor, y: Tensor, *args: Any) -> None:
        read.extend((x.shape[-1], y.shape[-1]))
        original_pair(out, x, y, *args)

    with Collector(model, discover(model).layers) as collector, FastPath(model, collector):
        monkeypatch.setattr(ops, "row_sumsq_", counting)
        monkeypatch.setattr(ops, "row_sumsq_pair_", counting_both)
        collector.begin(3)
        hidden_states(model, batch, torch.device("cpu"))
        collector.end()
    # v (2 heads of 32) and the output of attention (4 heads of 32), in each of the four blocks.
    assert sorted(read) == [64] * 4 + [128] * 4


def test_a_full_arena_costs_reads_and_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make("qwen3"), batches()
    plain = quietly(model, data)
    for vectors in (3, 5, 13):
        monkeypatch.setattr("plop_ext.collecting.arena._ARENA_ELEMENTS", vectors * 36)
        fast = quietly(model, data, fast=True)
        np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_restored(family: str) -> None:
    model = make(family)
    before = state(model)
    quietly(model, batches(), fast=True)
    assert_unchanged(before, model)

    def fails(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(**batch)
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        quietly(model, batches(), fast=True, forward=fails)
    assert_unchanged(before, model)


def test_code_that_changes_an_output_before_it_is_read_is_an_error_and_not_a_wrong_score() -> None:
    model, data = make("llama"), batches()
    q_proj, v_proj = (model.get_submodule(f"layers.0.self_attn.{name}") for name in ("q_proj", "v_proj"))
    kept: list[Tensor] = []

    def double(module: nn.Module, args: Any) -> None:
        kept[-1].mul_(2)

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        handles = [
            q_proj.register_forward_hook(lambda module, args, output: kept.append(output)),
            v_proj.register_forward_pre_hook(double),
        ]
        try:
            model(**batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    with pytest.raises(RuntimeError, match=r"the output of `layers\.0\.self_attn\.q_proj` was modified in place"):
        quietly(model, data, fast=True, forward=forward)


def test_what_transformers_returns_of_blocks_is_returned_once() -> None:
    model, batch = make("llama"), batches(1)[0]
    seen: list[int] = []

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        seen.append(len(model(**batch, use_cache=False, output_hidden_states=True).hidden_states))

    for _ in range(2):  # from the second run on the hooks that return them are there before
        fast = quietly(model, [batch, batch], fast=True, forward=forward)
        assert fast.provenance["fast"] == {"blocks": 4, "reason": None}
    assert seen == [5] * 4


def test_batches_in_and_out_of_inference_mode() -> None:
    model, data = make("llama"), batches()
    plain = quietly(model, data)
    turns = iter((True, False, True, False))

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with torch.inference_mode(next(turns)), torch.no_grad():
            model(**batch, use_cache=False)

    np.testing.assert_array_equal(quietly(model, data, forward=forward).totals, plain.totals)
    with pytest.warns(UserWarning, match="4 forwards of blocks ran without the kernels"):
        mixed = quietly(model, data, forward=forward, fast=True)
    np.testing.assert_allclose(mixed.totals, plain.totals, rtol=1e-5)


def test_forwards_that_stand_aside_keep_no_outputs_alive() -> None:
    model, batch = make("llama"), batches(1)[0]
    with torch.no_grad(), Collector(model, discover(model).layers) as collector, FastPath(model, collector):
        collector.begin(3, batch["attention_mask"].bool())
        with torch.inference_mode():
            model(**batch, use_cache=False)
        running = collector.recording.batch
        assert running is not None and [len(arena.deferred) for arena in running.arenas.values()] == [0]
        collector.end()


def test_with_gradients_the_model_runs_without_the_kernels() -> None:
    model, batch = make("llama"), batches(1)[0]

    def gradient() -> Tensor:
        model.zero_grad()
        model(**batch, use_cache=False).last_hidden_state.square().sum().backward()
        found = model.get_parameter("layers.0.mlp.gate_proj.weight").grad
        assert found is not None
        return found.clone()

    expected = gradient()
    with Collector(model, discover(model).layers) as collector, FastPath(model, collector):
        assert torch.equal(gradient(), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_autocast_and_inference_mode_run_the_model_as_it_was(family: str) -> None:
    model, data = make(family), batches()

    def autocast(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch, use_cache=False)

    def inference(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with torch.inference_mode():
            model(**batch, use_cache=False)

    for forward in (autocast, inference):
        with pytest.warns(
            UserWarning, match="has no effect: 8 forwards of blocks ran without the kernels, under autocast"
        ):
            fast = quietly(model, data, fast=True, forward=forward)
        assert fast.provenance["fast"]["blocks"] == 0
        np.testing.assert_array_equal(fast.totals, quietly(model, data, forward=forward).totals)


def test_layers_under_lora_keep_their_hooks() -> None:
    import peft

    model, data = make("llama"), batches()
    plain = quietly(model, data)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    fast = quietly(adapted, data, fast=True)
    assert fast.provenance["fast"]["blocks"] == 4
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)


def test_paper_script_reads_every_output_by_itself() -> None:
    with pytest.raises(plop_ext.InputError, match="`fast` reads outputs together"):
        quietly(make("llama"), batches(), fast=True, compat="paper-script")
