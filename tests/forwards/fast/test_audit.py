"""The fast path's check of the first batch: wrong kernels and compositions are found, right ones are not refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plop_ext import Collector, ops
from plop_ext.forwards.fast.blocks import FusedBlock
from plop_ext.layers import discover
from tests.support.fast_models import batches, make, needs_native
from tests.support.quiet import quietly

pytestmark = needs_native


def test_a_kernel_that_computes_something_else_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make("llama"), batches()
    plain = quietly(model, data)
    original = ops.gated_activation_

    def wrong(**arguments: Any) -> None:
        original(**{**arguments, "activation": "gelu_tanh"})

    monkeypatch.setattr(ops, "gated_activation_", wrong)
    with pytest.warns(UserWarning, match=r"`fast=True` has no effect: the fused kernels disagree with the model: .*"):
        fast = quietly(model, data, fast=True)
    assert fast.provenance["fast"]["blocks"] == 0
    np.testing.assert_array_equal(fast.totals, plain.totals)  # the first batch too, and once


def test_wrong_sums_of_one_module_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make("llama"), batches()
    original = ops.rotary_

    def wrong(**arguments: Any) -> None:
        original(**arguments)
        arguments["k_sumsq"].mul_(1.1)

    monkeypatch.setattr(ops, "rotary_", wrong)
    with pytest.warns(UserWarning, match=r"a row of rotary is off by 1\.0e-01, more than 1\.0e-05"):
        fast = quietly(model, data, fast=True)
    np.testing.assert_array_equal(fast.totals, quietly(model, data).totals)


def test_another_collector_on_the_model_counts_every_token_once() -> None:
    model, data = make("llama"), batches(1)
    totals: list[Tensor] = []

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with Collector(model, discover(model).layers) as other:
            other.begin(3, batch["attention_mask"].bool())
            model(**batch, use_cache=False)
            other.end()
        totals.append(other.recording.queue.all())

    quietly(model, data, fast=True, forward=forward)
    np.testing.assert_allclose(totals[0], quietly(model, data).totals, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_generation_and_prefixes_are_scored(padded: bool) -> None:
    import transformers

    causal = transformers.LlamaForCausalLM(make("llama").config).eval()  # type: ignore[arg-type]
    data = batches(padded=padded)

    def generates(model: Any, batch: dict[str, Tensor]) -> None:
        model.generate(**batch, max_new_tokens=2, do_sample=False)

    def prefixed(model: Any, batch: dict[str, Tensor]) -> None:
        cache = transformers.DynamicCache(config=model.config)
        model(batch["input_ids"][:, :2], past_key_values=cache, use_cache=True)
        mask = torch.cat((torch.ones(3, 2, dtype=torch.long), batch["attention_mask"]), dim=1)
        model(batch["input_ids"], attention_mask=mask, past_key_values=cache, use_cache=True)

    # Which of the two tokens of the prefix are padding cannot be told from the mask of the batch.
    for forward in (generates,) if padded else (generates, prefixed):
        plain = quietly(causal, data, forward=forward)
        fast = quietly(causal, data, forward=forward, fast=True)
        assert fast.provenance["fast"] == {"blocks": 4, "reason": None}
        np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)


def test_a_block_that_cannot_be_compared_is_scored_without_the_kernels() -> None:
    import transformers

    model, data = make("llama"), batches(2, padded=False)

    def only_with_a_past(model: Any, batch: dict[str, Tensor]) -> None:
        cache = transformers.DynamicCache(config=model.config)
        for layer in range(4):
            cache.update(torch.zeros(3, 2, 1, 32), torch.zeros(3, 2, 1, 32), layer)
        model(batch["input_ids"], past_key_values=cache, use_cache=True)

    plain = quietly(model, data, forward=only_with_a_past)
    with pytest.warns(UserWarning, match="could not be checked: its key-value cache holds earlier tokens"):
        fast = quietly(model, data, fast=True, forward=only_with_a_past)
    assert fast.provenance["fast"]["blocks"] == 0
    np.testing.assert_array_equal(fast.totals, plain.totals)


@pytest.mark.parametrize("as_tuple", [False, True], ids=["dict", "tuple"])
def test_a_batch_with_a_cache_fills_it_once(as_tuple: bool) -> None:
    """The check, and scoring again after it, would fill it once more: the batch after it is checked."""
    import transformers

    model, data = make("llama"), batches(3, padded=False)

    def with_caches() -> tuple[list[Any], list[Any]]:
        caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
        ids = data[1]["input_ids"]
        with torch.no_grad():
            for cache in caches:
                model(input_ids=data[0]["input_ids"], past_key_values=cache, use_cache=True)
        if as_tuple:
            return caches, [(ids, None, None, cache) for cache in caches] + data[2:]
        return caches, [{"input_ids": ids, "past_key_values": cache} for cache in caches] + data[2:]

    plain, (caches, given) = quietly(model, with_caches()[1]), with_caches()
    fast = quietly(model, given, fast=True)
    assert [cache.get_seq_length() for cache in caches] == [24, 24]
    assert fast.provenance["fast"]["blocks"] == 4
    early = "2 batches with a key-value cache came before the first batch without a cache"
    reason = f"{early}, on which the kernels can be checked"
    assert fast.provenance["fast"]["reason"] == reason
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)
    with pytest.warns(UserWarning, match="no effect: 1 batch with a key-value cache, and no batch without a cache"):
        only = quietly(model, with_caches()[1][:1], fast=True)
    np.testing.assert_array_equal(only.totals, plain.totals.of_samples(slice(3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_small_errors_of_a_kernel_are_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make("phi3", dtype), batches()
    with torch.no_grad():  # one token whose activations dwarf the others
        model.get_parameter("embed_tokens.weight")[int(data[0]["input_ids"][0, 0])] *= 2000
    assert quietly(model, data, fast=True).provenance["fast"] == {"blocks": 4, "reason": None}
    gated, rotary, add_norm = ops.gated_activation_, ops.rotary_, ops.add_rms_norm_

    def gelu(**arguments: Any) -> None:
        gated(**{**arguments, "activation": "gelu_tanh"})

    def unturned(**arguments: Any) -> None:
        rotary(**arguments)
        arguments["q_out"].copy_(arguments["q"])

    def uneven(**arguments: Any) -> None:
        add_norm(**arguments)
        if arguments["x_sumsq"] is not None:
            arguments["x_sumsq"][::2] *= 1.02
            arguments["x_sumsq"][1::2] *= 0.98

    for name, wrong in (("gated_activation_", gelu), ("rotary_", unturned), ("add_rms_norm_", uneven)):
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="the fused kernels disagree"):
            patch.setattr(ops, name, wrong)
            assert quietly(model, data, fast=True).provenance["fast"]["blocks"] == 0


def test_a_family_put_together_in_another_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels may be right and another release of transformers may compose a block differently."""
    model, data = make("llama"), batches()
    plain = quietly(model, data)
    original = FusedBlock.forward
    monkeypatch.setattr(FusedBlock, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs) * 1.1)
    with pytest.warns(UserWarning, match="the update of the residual by a LlamaDecoderLayer is off by"):
        fast = quietly(model, data, fast=True)
    np.testing.assert_array_equal(fast.totals, plain.totals)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_errors_in_one_sample_or_in_late_rows_are_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", dtype, max_position_embeddings=4096)
    data = batches(1, samples=3, tokens=1200, padded=False)
    assert quietly(model, data, fast=True).provenance["fast"] == {"blocks": 4, "reason": None}
    rotary, gated = ops.rotary_, ops.gated_activation_

    def last_sample(**arguments: Any) -> None:
        rotary(**arguments)
        arguments["q_out"][-1] = arguments["q"][-1]

    def balanced(**arguments: Any) -> None:
        rotary(**arguments)
        arguments["k_sumsq"][1200:2400] *= 1.3
        arguments["k_sumsq"][2400:] *= 0.74

    def late(**arguments: Any) -> None:
        gated(**arguments)
        arguments["out_sumsq"][2048:] *= 1.1

    for name, wrong in (("rotary_", last_sample), ("rotary_", balanced), ("gated_activation_", late)):
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="the fused kernels disagree"):
            patch.setattr(ops, name, wrong)
            assert quietly(model, data, fast=True).provenance["fast"]["blocks"] == 0


@pytest.mark.parametrize("token_step", [5, 16, 64])
def test_few_or_no_rows_are_read(token_step: int) -> None:
    import transformers

    causal = transformers.LlamaForCausalLM(make("llama").config).eval()  # type: ignore[arg-type]
    data = batches(3, padded=False)

    def generates(model: Any, batch: dict[str, Tensor]) -> None:
        model.generate(**batch, max_new_tokens=2, do_sample=False)

    for forward in (None, generates):
        plain = quietly(causal, data, token_step=token_step, forward=forward)
        fast = quietly(causal, data, token_step=token_step, forward=forward, fast=True)
        assert fast.provenance["fast"] == {"blocks": 4, "reason": None}
        np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)


def test_negative_gates_of_gelu_are_no_disagreement() -> None:
    model = make("gemma2", mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_proj.weight"):
                parameter.mul_(0.01)
    for name, module in model.named_modules():
        if name.endswith("gate_proj"):
            module.bias = nn.Parameter(torch.full((160,), -4.5))
    assert quietly(model, batches(), fast=True).provenance["fast"] == {"blocks": 4, "reason": None}


def test_a_block_used_twice() -> None:
    model, data = make("llama"), batches()
    model.layers[3] = model.layers[0]  # type: ignore[index, operator]
    plain = quietly(model, data)
    fast = quietly(model, data, fast=True)
    assert fast.provenance["fast"]["reason"] is None
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)


def test_a_forward_that_ends_early() -> None:
    model, data = make("llama"), batches()

    class Enough(Exception):
        pass

    def early(model: nn.Module, batch: dict[str, Tensor]) -> None:
        def stop(module: nn.Module, args: Any) -> None:
            raise Enough

        handle = model.get_submodule("norm").register_forward_pre_hook(stop)
        with pytest.raises(Enough):
            model(**batch, use_cache=False)
        handle.remove()

    plain = quietly(model, data, forward=early)
    fast = quietly(model, data, forward=early, fast=True)
    assert fast.provenance["fast"] == {"blocks": 4, "reason": None}
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)
