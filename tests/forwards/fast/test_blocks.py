"""Which blocks take the fast path: known by class, code and hooks; the others are scored as without it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plop_ext.forwards.fast.families import find_blocks
from tests.support import fast_models
from tests.support.fast_models import batches, make, needs_native
from tests.support.model_state import assert_unchanged, state
from tests.support.quiet import quietly

pytestmark = needs_native


def test_an_unknown_model_is_scored_without_it_and_a_warning_says_why() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=2, n_positions=32)
    model = transformers.GPT2Model(config).eval()
    with pytest.warns(UserWarning, match="`fast=True` has no effect: the model has no blocks of a family"):
        fast = quietly(model, batches(), fast=True)
    np.testing.assert_array_equal(fast.totals, quietly(model, batches()).totals)
    assert fast.provenance["fast"]["blocks"] == 0


def test_a_list_of_blocks_may_be_empty() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList()
    assert find_blocks(model) == ([], [])


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
    with pytest.warns(
        UserWarning, match="speeds up 3 blocks: 2 forwards of blocks ran without the kernels, .* with hooks"
    ):
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


def test_blocks_know_the_norm_that_reads_their_output() -> None:
    import transformers

    config = transformers.LlamaConfig(**fast_models._TEXT)
    model = transformers.LlamaForCausalLM(config).eval()
    blocks, reasons = find_blocks(model)
    assert (len(blocks), reasons) == (4, [])
    assert blocks[-1].following is not None and blocks[-1].following.module is model.model.norm
    assert blocks[0].following is not None and blocks[0].following.module is model.model.layers[1].input_layernorm
