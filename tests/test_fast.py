"""The fast path: same scores and outputs as without it, on every family; nothing left behind; stands aside in time."""

from __future__ import annotations

import functools
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
from plop_ext.fast.forwards import FusedBlock
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
        warnings.filterwarnings("ignore", message=".*NaN or infinite")
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
    with pytest.warns(UserWarning, match=r"a row of rotary is off by 1\.0e-01, more than 1\.0e-05"):
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


def replaced_activation(model: Any) -> None:
    act = model.layers[1].mlp.act_fn
    vars(act)["forward"] = lambda x: x * 2


def replaced_norm(model: Any) -> None:
    norm = model.layers[1].input_layernorm
    vars(norm)["forward"] = lambda x: type(norm).forward(norm, x) * 1.5


def own_mlp(model: Any) -> None:
    class Own(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            self.act_fn = mlp.act_fn

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) + 1.0)

    model.layers[1].mlp = Own(model.layers[1].mlp)


def pruned_mlp(model: Any) -> None:
    model.layers[1].mlp = nn.Identity()


def misaligned_weight(model: Any) -> None:
    weight = model.layers[1].input_layernorm.weight
    buffer = torch.empty(len(weight) + 1, dtype=weight.dtype, device=weight.device)
    buffer[1:] = weight.detach()
    weight.data = buffer[1:]


def doubled(name: str) -> Any:
    """A hook that changes in place what a module of block 1 returns."""

    def change(model: Any) -> None:
        def double(module: nn.Module, args: Any, output: Any) -> None:
            (output[0] if isinstance(output, tuple) else output).mul_(2)

        model.get_submodule(f"layers.1.{name}".rstrip(".")).register_forward_hook(double)

    return change


CHANGES = {
    "replaced forward": ("llama", replaced_forward, "the forward of a LlamaMLP has been replaced"),
    "replaced activation": ("llama", replaced_activation, "the forward of a SiLUActivation has been replaced"),
    "replaced norm": ("llama", replaced_norm, "the forward of a LlamaRMSNorm has been replaced"),
    "own mlp": ("llama", own_mlp, "`mlp` of a LlamaDecoderLayer is a Own and not a LlamaMLP"),
    "pruned mlp": ("llama", pruned_mlp, "`mlp` of a LlamaDecoderLayer is a Identity and not a LlamaMLP"),
    "misaligned": ("llama", misaligned_weight, "the weight of a LlamaRMSNorm starts where the kernels cannot read it"),
    "hook on the mlp": ("llama", doubled("mlp"), "there is a hook on a LlamaMLP"),
    "hook on gate_proj": ("llama", doubled("mlp.gate_proj"), "there is a hook on a Linear"),
    "hook on attention": ("qwen3", doubled("self_attn"), "there is a hook on a Qwen3Attention"),
    "hook on q_norm": ("qwen3", doubled("self_attn.q_norm"), "there is a hook on a Qwen3RMSNorm"),
    "hook on dropout": ("phi3", doubled("resid_mlp_dropout"), "there is a hook on a Dropout"),
    "hook on the block": ("gemma2", doubled(""), "there is a hook on a Gemma2DecoderLayer"),
}


@pytest.mark.parametrize("family, change, reason", CHANGES.values(), ids=CHANGES)
def test_a_changed_block_is_left_out(family: str, change: Any, reason: str) -> None:
    model, data = make(family), batches()
    change(model)
    before = state(model)
    plain = quietly(model, data)
    with pytest.warns(UserWarning, match="speeds up 3 blocks"):
        fast = quietly(model, data, fast=True)
    assert fast.provenance["fast"] == {"blocks": 3, "reason": f"1 block is left out: {reason}"}
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)
    assert_unchanged(before, model)


def test_a_last_norm_of_someone_elses_stays_and_is_called() -> None:
    model, data = make("llama"), batches()
    calls: list[Tensor] = []
    vars(model.get_submodule("norm"))["forward"] = lambda x: calls.append(x) or x
    before = state(model)
    fast = quietly(model, data, fast=True)
    assert fast.provenance["fast"] == {"blocks": 4, "reason": None}
    assert len(calls) == len(data)
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


def test_a_subclass_is_not_taken_for_its_base() -> None:
    model: Any = make("llama")
    block = model.layers[1]
    block.__class__ = type("Own", (type(block),), {})
    blocks, _ = find_blocks(model)
    assert [each.module for each in blocks] == [model.layers[0], model.layers[2], model.layers[3]]
    assert blocks[0].following is None  # what reads its output may be anything


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


def test_what_transformers_returns_of_blocks_is_returned_once() -> None:
    model, batch = make("llama"), batches(1)[0]
    seen: list[int] = []

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        seen.append(len(model(**batch, use_cache=False, output_hidden_states=True).hidden_states))

    for _ in range(2):  # from the second run on the hooks that return them are there before
        fast = quietly(model, [batch, batch], fast=True, forward=forward)
        assert fast.provenance["fast"] == {"blocks": 4, "reason": None}
    assert seen == [5] * 4


def test_another_collector_on_the_model_counts_every_token_once() -> None:
    model, data = make("llama"), batches(1)
    totals: list[Tensor] = []

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with Collector(model, discover(model).layers) as other:
            other.begin(3, batch["attention_mask"].bool())
            model(**batch, use_cache=False)
            other.end()
        totals.append(other.totals())

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

    for forward in (generates, prefixed):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_small_errors_of_a_kernel_are_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make("phi3", dtype), batches()
    with torch.no_grad():  # one token whose activations dwarf the others
        model.get_parameter("embed_tokens.weight")[int(data[0]["input_ids"][0, 0])] *= 2000
    assert quietly(model, data, fast=True).provenance["fast"] == {"blocks": 4, "reason": None}
    gated, rotary, add_norm = ops.gated_activation_, ops.rotary_, ops.add_rms_norm_

    def gelu(out: Tensor, gate: Tensor, up: Tensor, activation: str, *args: Any) -> None:
        gated(out, gate, up, "gelu_tanh", *args)

    def unturned(*args: Any) -> None:
        rotary(*args)
        args[0].copy_(args[2])

    def uneven(*args: Any) -> None:
        add_norm(*args)
        if args[10] is not None:
            args[10][::2] *= 1.02
            args[10][1::2] *= 0.98

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
    with pytest.warns(UserWarning, match="what a LlamaDecoderLayer adds is off by"):
        fast = quietly(model, data, fast=True)
    np.testing.assert_array_equal(fast.totals, plain.totals)


def wrapped(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries do that patch classes: the wrapper says which function it stands for."""
    original = kind.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("name", ["LlamaDecoderLayer", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm"])
def test_a_class_that_was_patched_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    model, data = make("llama"), batches()
    wrapped(getattr(modeling_llama, name), monkeypatch)
    with pytest.warns(UserWarning, match=f"4 blocks are left out: the forward of {name} has been replaced"):
        quietly(model, data, fast=True)

    class LlamaMLP(modeling_llama.LlamaMLP):
        pass

    monkeypatch.undo()
    monkeypatch.setattr(modeling_llama, "LlamaMLP", LlamaMLP)
    with pytest.warns(UserWarning, match="4 blocks are left out: `mlp` of a LlamaDecoderLayer is a LlamaMLP"):
        quietly(make("llama"), data, fast=True)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "layers.0.mlp.act_fn"),
        ("gemma2", "layers.0.post_attention_layernorm"),
        ("gemma2", "layers.1.post_feedforward_layernorm"),
        ("qwen3", "layers.0.self_attn.q_norm"),
        ("phi3", "layers.1.resid_attn_dropout"),
    ],
)
def test_hooks_that_come_during_a_forward_are_called(family: str, name: str) -> None:
    model, data = make(family), batches()
    module = model.get_submodule(name)
    calls: list[int] = []

    def hooked(model: nn.Module, batch: dict[str, Tensor]) -> None:
        handle = module.register_forward_hook(lambda module, args, output: calls.append(1) or output * 2)
        model(**batch, use_cache=False)
        handle.remove()

    plain = quietly(model, data, forward=hooked)
    calls.clear()
    with pytest.warns(UserWarning, match="speeds up 3 blocks: 2 forwards of blocks ran as they were, .* with hooks"):
        fast = quietly(model, data, fast=True, forward=hooked)
    assert len(calls) == len(data)
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)


def test_a_forward_put_in_place_during_a_batch_stays_there() -> None:
    model, data = make("llama"), batches()
    mlp = model.get_submodule("layers.1.mlp")
    calls: list[int] = []

    def ablated(model: nn.Module, batch: dict[str, Tensor]) -> None:
        before = vars(mlp).get("forward")
        vars(mlp)["forward"] = lambda x: calls.append(1) or torch.zeros_like(x)
        model(**batch, use_cache=False)
        if before is None:
            del vars(mlp)["forward"]
        else:
            vars(mlp)["forward"] = before

    plain = quietly(model, data, forward=ablated)
    calls.clear()
    fast = quietly(model, data, fast=True, forward=ablated)
    assert len(calls) >= len(data)
    assert [module.name for module in fast.modules] == [module.name for module in plain.modules]
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_errors_in_one_sample_or_in_late_rows_are_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", dtype, max_position_embeddings=4096)
    data = batches(1, samples=3, tokens=1200, padded=False)
    assert quietly(model, data, fast=True).provenance["fast"] == {"blocks": 4, "reason": None}
    rotary, gated = ops.rotary_, ops.gated_activation_

    def last_sample(*args: Any) -> None:
        rotary(*args)
        args[0][-1] = args[2][-1]

    def balanced(*args: Any) -> None:
        rotary(*args)
        args[13][1200:2400] *= 1.3
        args[13][2400:] *= 0.74

    def late(*args: Any) -> None:
        gated(*args)
        args[8][2048:] *= 1.1

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


def test_batches_in_and_out_of_inference_mode() -> None:
    model, data = make("llama"), batches()
    plain = quietly(model, data)
    turns = iter((True, False, True, False))

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with torch.inference_mode(next(turns)), torch.no_grad():
            model(**batch, use_cache=False)

    np.testing.assert_array_equal(quietly(model, data, forward=forward).totals, plain.totals)
    with pytest.warns(UserWarning, match="4 forwards of blocks ran as they were"):
        mixed = quietly(model, data, forward=forward, fast=True)
    np.testing.assert_allclose(mixed.totals, plain.totals, rtol=1e-5)


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


def test_forwards_that_stand_aside_keep_no_outputs_alive() -> None:
    model, batch = make("llama"), batches(1)[0]
    with torch.no_grad(), Collector(model, discover(model).layers) as collector, FastPath(model, collector):
        collector.begin(3, batch["attention_mask"].bool())
        with torch.inference_mode():
            model(**batch, use_cache=False)
        assert [len(arena._pending) for arena in collector._arenas.values()] == [0]
        collector.end()


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
        with pytest.warns(UserWarning, match="has no effect: 8 forwards of blocks ran as they were, under autocast"):
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


def test_blocks_know_the_norm_that_reads_their_output() -> None:
    import transformers

    config = transformers.LlamaConfig(**fast_models._TEXT)
    model = transformers.LlamaForCausalLM(config).eval()
    blocks, reasons = find_blocks(model)
    assert (len(blocks), reasons) == (4, [])
    assert blocks[-1].following is not None and blocks[-1].following.module is model.model.norm
    assert blocks[0].following is not None and blocks[0].following.module is model.model.layers[1].input_layernorm


def test_paper_script_reads_every_output_by_itself() -> None:
    with pytest.raises(plop_ext.InputError, match="`fast` reads outputs together"):
        quietly(make("llama"), batches(), fast=True, compat="paper-script")
