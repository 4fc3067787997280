"""The fast path: same scores and outputs as without it, on every family; nothing left behind; stands aside in time."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext import Collector, ops
from plop_ext.fast import FastPath
from plop_ext.fast.families import find_blocks
from plop_ext.layers import discover
from tests import fast_models
from tests.fast_models import FAMILIES, batches, make
from tests.test_model_left_alone import assert_unchanged, state

needs_native = pytest.mark.skipif(not ops.STATUS.loaded, reason="the fast path needs the native kernels")
pytestmark = needs_native

# Gains of single modules; a kernel rounds like the module it stands for but adds in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def quietly(model: nn.Module, data: list[Any], **kwargs: Any) -> plop_ext.Scores:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fewer than.*counted tokens")
        return plop_ext.score(model, data, progress=False, max_samples=None, **kwargs)


def hidden_states(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """What every block returns, and the last hidden state."""
    with torch.no_grad():
        inputs = {key: value.to(device) for key, value in batch.items()}
        found = model(**inputs, use_cache=False, output_hidden_states=True)
    return (*found.hidden_states, found.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_hooks(family: str, dtype: torch.dtype, device: torch.device) -> None:
    model, data = make(family, dtype, device), batches()
    plain = quietly(model, data)
    fast = quietly(model, data, fast=True)
    assert fast.provenance["fast"] == {"blocks": 4, "reason": None}
    assert [module.name for module in fast.modules] == [module.name for module in plain.modules]
    np.testing.assert_array_equal(fast.totals[:, :, 2:], plain.totals[:, :, 2:])
    np.testing.assert_allclose(fast.totals[:, :, :2], plain.totals[:, :, :2], rtol=TOLERANCE[dtype])


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
    np.testing.assert_array_equal(fast.totals[:, :, 2:], plain.totals[:, :, 2:])
    np.testing.assert_allclose(fast.totals[:, :, :2], plain.totals[:, :, :2], rtol=1e-5)


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
        monkeypatch.setattr("plop_ext.scoring.arena._ARENA_ELEMENTS", vectors * 36)
        fast = quietly(model, data, fast=True)
        np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family: str) -> None:
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


def test_a_kernel_that_computes_something_else_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make("llama"), batches()
    plain = quietly(model, data)
    original = ops.gated_activation_

    def wrong(out: Tensor, gate: Tensor, up: Tensor, activation: str, *args: Any) -> None:
        original(out, gate, up, "gelu_tanh", *args)

    monkeypatch.setattr(ops, "gated_activation_", wrong)
    with pytest.warns(UserWarning, match=r"`fast=True` has no effect: the fused kernels disagree with the model: .*"):
        fast = quietly(model, data, fast=True)
    assert fast.provenance["fast"]["blocks"] == 0
    np.testing.assert_array_equal(fast.totals, plain.totals)  # the first batch too, and once


def test_wrong_sums_of_one_module_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make("llama"), batches()
    original = ops.rotary_

    def wrong(*args: Any) -> None:
        original(*args)
        args[13].mul_(1.1)  # k_sumsq

    monkeypatch.setattr(ops, "rotary_", wrong)
    with pytest.warns(UserWarning, match=r"the mean gain of layers\.0\.self_attn\.k_proj is off by 4\.9e-02"):
        fast = quietly(model, data, fast=True)
    np.testing.assert_array_equal(fast.totals, quietly(model, data).totals)


def test_an_unknown_model_is_scored_without_it_and_a_warning_says_why() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=2, n_positions=32)
    model = transformers.GPT2Model(config).eval()
    with pytest.warns(UserWarning, match="`fast=True` has no effect: the model has no blocks of a family"):
        fast = quietly(model, batches(), fast=True)
    np.testing.assert_array_equal(fast.totals, quietly(model, batches()).totals)
    assert fast.provenance["fast"]["blocks"] == 0


def replaced_forward(model: Any) -> None:
    mlp = model.layers[1].mlp
    vars(mlp)["forward"] = lambda x: type(mlp).forward(mlp, x)


def hooked_norm(model: Any) -> None:
    model.layers[1].post_attention_layernorm.register_forward_hook(lambda *_: None)


def subclass(model: Any) -> None:
    block = model.layers[1]
    block.__class__ = type("Own", (type(block),), {})


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("llama", replaced_forward, "1 blocks are left out: the forward of a LlamaMLP has been replaced"),
        ("gemma2", hooked_norm, "1 blocks are left out: a hook on a Gemma2RMSNorm needs the norm by itself"),
    ],
)
def test_a_changed_block_is_left_out(family: str, change: Any, reason: str) -> None:
    model, data = make(family), batches()
    plain = quietly(model, data)
    change(model)
    with pytest.warns(UserWarning, match="speeds up 3 blocks"):
        fast = quietly(model, data, fast=True)
    assert fast.provenance["fast"] == {"blocks": 3, "reason": reason}
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)


def test_a_subclass_is_not_taken_for_its_base() -> None:
    model = make("llama")
    subclass(model)
    assert len(find_blocks(model)[0]) == 3


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_act": "gelu"}, "there is no kernel for the activation GELUActivation"),
        ({"intermediate_size": 164}, "intermediate_size must be a multiple of 8, is 164"),
        ({"head_dim": 24}, "there is no kernel for heads of 24"),
        ({"hidden_size": 60}, "hidden_size must be a multiple of 8, at most 16384, is 60"),
    ],
)
def test_sizes_and_activations_without_a_kernel(fields: dict[str, Any], reason: str) -> None:
    model = make("llama", **fields)
    blocks, reasons = find_blocks(model)
    assert (blocks, set(reasons)) == ([], {reason})
    with pytest.warns(UserWarning, match="has no effect: 4 blocks are left out"):
        quietly(model, batches(), fast=True)


def test_hooks_of_the_user_see_what_they_always_saw() -> None:
    model, batch = make("llama"), batches(1)[0]
    names = ["layers.1.input_layernorm", "layers.1.post_attention_layernorm", "layers.1.mlp", "layers.2", "norm"]
    names += ["layers.1.mlp.gate_proj", "layers.1.self_attn.q_proj"]

    def record() -> dict[str, tuple[Tensor, Tensor]]:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(name: str) -> Any:
            return lambda module, args, output: seen.__setitem__(name, (args[0].clone(), output.clone()))

        handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
        hidden_states(model, batch, torch.device("cpu"))
        for handle in handles:
            handle.remove()
        return seen

    expected = record()
    with Collector(model, discover(model).layers) as collector, FastPath(model, collector) as path:
        assert path.blocks == 4
        found = record()
    for name in names:
        for ours, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_hook_that_replaces_an_output_changes_what_follows() -> None:
    model, data = make("llama"), batches()
    model.get_submodule("layers.1").register_forward_hook(lambda module, args, output: output * 2)
    model.get_submodule("layers.2.mlp.up_proj").register_forward_hook(lambda module, args, output: output + 1)
    plain = quietly(model, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = quietly(model, data, fast=True)
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)


def test_with_gradients_the_model_runs_as_it_was() -> None:
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
        fast = quietly(model, data, fast=True, forward=forward)
        np.testing.assert_array_equal(fast.totals, quietly(model, data, forward=forward).totals)


def test_lora_and_quantized_layers_keep_their_hooks() -> None:
    import peft

    model, data = make("llama"), batches()
    plain = quietly(model, data)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    fast = quietly(adapted, data, fast=True)
    assert fast.provenance["fast"]["blocks"] == 4
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)


def test_the_blocks_of_a_causal_model_and_of_a_multimodal_one_are_found() -> None:
    import transformers

    config = transformers.LlamaConfig(**fast_models._TEXT)
    model = transformers.LlamaForCausalLM(config).eval()
    blocks, reasons = find_blocks(model)
    assert (len(blocks), reasons) == (4, [])
    assert blocks[-1].following is not None and blocks[-1].following.module is model.model.norm
    assert blocks[0].following is not None and blocks[0].following.module is model.model.layers[1].input_layernorm


def test_paper_script_reads_every_output_by_itself() -> None:
    with pytest.raises(plop_ext.InputError, match="does not go with compat"):
        quietly(make("llama"), batches(), fast=True, compat="paper-script")
