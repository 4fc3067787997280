"""The fast path where gate and up are never made: same scores as by hooks, and when it stands aside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext import Collector, ops
from plop_ext.forwards.fast import FastPath, kernels
from plop_ext.layers import LinearLayer, discover
from plop_ext.layers.linear import LinearAdapter
from tests.support.fast_models import FAMILIES, TOLERANCE, batches, hidden_states, make, needs_native
from tests.support.model_state import assert_unchanged, state
from tests.support.quiet import quietly
from tests.support.totals import assert_close

pytestmark = needs_native

WITHOUT_BIAS = [family for family in FAMILIES if family != "llama_biased"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[int]:
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


# Calls in two batches of a model of four blocks: in the first one, which is checked, blocks that are compared take the
# kernel, the first and the last of each kind; then all do.
CALLS = 2 + 4
CALLS_OF_TWO_KINDS = 4 + 4


def compared(
    model: nn.Module,
    data: list[Any],
    calls: list[int],
    expected: int,
    rtol: float = TOLERANCE[torch.bfloat16],
    **kwargs: Any,
) -> None:
    """The fast path scores as hooks do, with so many calls of the op."""
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("token_step", [1, 5])
@pytest.mark.parametrize("family", WITHOUT_BIAS)
def test_scores_are_those_of_the_hooks(
    family: str, token_step: int, dtype: torch.dtype, device: torch.device, calls: list[int]
) -> None:
    model, data = make(family, dtype, device), batches()
    expected = CALLS_OF_TWO_KINDS if family == "gemma2" else CALLS
    compared(model, data, calls, expected, 2 * TOLERANCE[dtype], token_step=token_step, seed=3)


@pytest.mark.parametrize("family", WITHOUT_BIAS)
def test_hidden_states_are_those_of_the_model(family: str, device: torch.device, calls: list[int]) -> None:
    model, batch = make(family, torch.bfloat16, device), batches(1)[0]
    expected = hidden_states(model, batch, device)
    with Collector(model, discover(model).layers) as collector, agreed(FastPath(model, collector)):
        found = hidden_states(model, batch, device)  # of no batch that counts
    assert len(calls) == 4
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours.float() - theirs.float()).norm(dim=-1) / theirs.float().norm(dim=-1)
        assert error.max() < 0.02


def biased(model: nn.Module) -> None:
    linear = model.get_submodule("layers.1.mlp.up_proj")
    linear.bias = nn.Parameter(torch.ones_like(linear.weight[:, 0]))  # type: ignore[index]


def sharing(model: nn.Module) -> None:
    """A weight that is a view with rows further apart."""
    linear = model.get_submodule("layers.1.mlp.up_proj")
    wide = torch.cat((linear.weight, linear.weight), dim=1)  # type: ignore[arg-type]
    linear.weight = nn.Parameter(wide[:, : linear.weight.shape[1]])  # type: ignore[index, union-attr]


def subclassed(model: nn.Module) -> None:
    class Linear(nn.Linear):
        pass

    model.get_submodule("layers.1.mlp.up_proj").__class__ = Linear


def misaligned(model: nn.Module) -> None:
    linear: Any = model.get_submodule("layers.1.mlp.up_proj")
    room = torch.cat((linear.weight.flatten()[:1], linear.weight.flatten()))
    linear.weight = nn.Parameter(room[1:].view(linear.weight.shape))


def narrow(model: nn.Module) -> None:
    """Pruned to a width that no kernel reads, behind the configuration's back."""
    mlp: Any = model.get_submodule("layers.1.mlp")
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = nn.Parameter(linear.weight[:100].clone())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :100].clone())


def of_another_class(model: nn.Module) -> None:
    class Packed(Tensor):
        pass

    linear: Any = model.get_submodule("layers.1.mlp.up_proj")
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed))


def of_one_layer(model: nn.Module) -> None:
    mlp: Any = model.get_submodule("layers.1.mlp")
    mlp.up_proj = mlp.gate_proj


@pytest.mark.parametrize("change", [biased, sharing, subclassed, misaligned, narrow, of_another_class, of_one_layer])
def test_other_layers_are_called(change: Callable[[nn.Module], None], device: torch.device, calls: list[int]) -> None:
    model = make("llama", torch.bfloat16, device)
    change(model)
    compared(model, batches(), calls, 2 + 3)


@pytest.mark.parametrize("family, dtype", [("llama_biased", torch.bfloat16), ("llama", torch.float32)])
def test_models_with_biases_and_float32_keep_the_products(
    family: str, dtype: torch.dtype, device: torch.device, calls: list[int]
) -> None:
    compared(make(family, dtype, device), batches(), calls, 0)


def test_few_tokens_keep_the_products(monkeypatch: pytest.MonkeyPatch, device: torch.device, calls: list[int]) -> None:
    model, data = make("llama", torch.bfloat16, device), batches()
    for rows, expected in ((36, CALLS), (37, 0)):  # 3 samples of 12 tokens
        monkeypatch.setattr(kernels, "_PROJECTED_ROWS", rows)
        compared(model, data, calls, expected)


def test_a_device_without_the_kernel_keeps_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PROJECTED_ROWS", 1)
    monkeypatch.setattr(ops, "gated_projection_", None)
    assert not ops.has_gated_projection(torch.device("cpu"))
    model, data = make("llama", torch.bfloat16), batches()
    assert quietly(model, data, fast=True).provenance["fast"] == {"blocks": 4, "reason": None}


def test_layers_under_lora_are_called(device: torch.device, calls: list[int]) -> None:
    import peft

    model = make("llama", torch.bfloat16, device)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*layers\.2\.mlp\.gate_proj"))
    compared(adapted, batches(), calls, 2 + 3)


@pytest.mark.parametrize("before", [True, False], ids=["pre-hook", "hook"])
def test_hooks_that_come_during_a_forward_are_called(before: bool, device: torch.device, calls: list[int]) -> None:
    model, data = make("llama", torch.bfloat16, device), batches()
    module = model.get_submodule("layers.1.mlp.gate_proj")
    seen: list[int] = []

    def hooked(model: nn.Module, batch: dict[str, Tensor]) -> None:
        if before:
            handle = module.register_forward_pre_hook(lambda module, args: seen.append(1) or (args[0] * 2,))
        else:
            handle = module.register_forward_hook(lambda module, args, output: seen.append(1) or output * 2)
        model(**batch, use_cache=False)
        handle.remove()

    plain = quietly(model, data, forward=hooked)
    seen.clear()
    calls.clear()
    fast = quietly(model, data, forward=hooked, fast=True)
    assert fast.provenance["fast"] == {"blocks": 4, "reason": None}
    assert len(seen) == len(data)
    assert len(calls) == 2 + 3
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=2 * TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    "family, names", [("llama", ["gate_proj"]), ("llama", ["up_proj", "q_proj"]), ("phi3", ["o_proj"])]
)
def test_some_or_none_of_its_layers_scored(
    family: str, names: list[str], device: torch.device, calls: list[int]
) -> None:
    model, batch = make(family, torch.bfloat16, device), batches(1)[0]
    layers = [layer for layer in discover(model).layers if layer.name.split(".")[-1] in names]
    assert layers
    plain, fast = (
        observed(model, layers, batch, device, fast, mask=batch["attention_mask"].bool()) for fast in (False, True)
    )
    assert len(calls) == 4
    torch.testing.assert_close(fast.totals(), plain.totals(), rtol=2 * TOLERANCE[torch.bfloat16], atol=0)


def test_a_weight_of_another_class_that_is_not_scored(device: torch.device, calls: list[int]) -> None:
    model = make("llama", torch.bfloat16, device)
    of_another_class(model)
    layers = [layer for layer in discover(model).layers if layer.name.endswith("q_proj")]
    observed(model, layers, batches(1)[0], device, True)
    assert len(calls) == 3


def test_only_v_and_the_output_of_attention_are_read(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, calls: list[int]
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
    assert len(calls) == 4


def test_layers_of_a_batch_without_a_mask_are_named(device: torch.device, calls: list[int]) -> None:
    model, batch = make("llama", torch.bfloat16, device), batches(1)[0]
    layers = discover(model).layers
    plain, fast = (observed(model, layers, batch, device, fast) for fast in (False, True))
    assert len(calls) == 4
    assert plain.unmasked == fast.unmasked != set()


@pytest.mark.parametrize("vectors", [3, 5, 13])
def test_a_full_arena(vectors: int, monkeypatch: pytest.MonkeyPatch, device: torch.device, calls: list[int]) -> None:
    monkeypatch.setattr("plop_ext.collecting.arena._ARENA_ELEMENTS", vectors * 36)
    compared(make("qwen3", torch.bfloat16, device), batches(), calls, CALLS)


def test_a_block_used_twice(device: torch.device, calls: list[int]) -> None:
    model = make("llama", torch.bfloat16, device)
    model.layers[3] = model.layers[0]  # type: ignore[index, operator]
    compared(model, batches(), calls, CALLS)


def test_another_collector_on_the_model_keeps_its_hooks(device: torch.device, calls: list[int]) -> None:
    model, data = make("llama", torch.bfloat16, device), batches(1)
    totals: list[Tensor] = []

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with Collector(model, discover(model).layers) as other:
            other.begin(3, batch["attention_mask"].bool())
            model(**batch, use_cache=False)
            other.end()
        totals.append(other.totals())

    plain = quietly(model, data, forward=forward)
    fast = quietly(model, data, forward=forward, fast=True)
    assert calls == []
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=2 * TOLERANCE[torch.bfloat16])
    torch.testing.assert_close(totals[-1], totals[0], rtol=2 * TOLERANCE[torch.bfloat16], atol=0)


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
    monkeypatch: pytest.MonkeyPatch, device: torch.device, calls: list[int]
) -> None:
    monkeypatch.setattr(kernels, "_PROJECTED_ROWS", 36)
    model = make("llama", torch.bfloat16, device)
    compared(model, growing(), calls, 0 + 0 + 2 + 4)  # wanted by the second, compared in the third
    wrongly(monkeypatch)
    calls.clear()
    with pytest.warns(UserWarning, match="a row of gated_projection is off"):
        fast = quietly(model, growing(), fast=True)
    assert len(calls) == 2
    np.testing.assert_allclose(fast.totals, quietly(model, growing()).totals, rtol=2 * TOLERANCE[torch.bfloat16])


def test_blocks_between_those_that_are_compared(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, calls: list[int]
) -> None:
    import peft

    model = make("llama", torch.bfloat16, device)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*layers\.[03]\.mlp\.gate_proj"))
    compared(model, batches(), calls, 1 + 2)  # the first of the others is compared as well
    wrongly(monkeypatch)
    with pytest.warns(UserWarning, match="a row of gated_projection is off"):
        fast = quietly(model, batches(), fast=True)
    np.testing.assert_array_equal(fast.totals, quietly(model, batches()).totals)


def test_a_kernel_wanted_in_vain_is_not_checked_for_ever(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, calls: list[int]
) -> None:
    monkeypatch.setattr(kernels, "_PROJECTED_ROWS", 36)
    model, small, large = make("llama", torch.bfloat16, device), batches(1, samples=1), batches(1)
    compared(model, (small + large) * 8, calls, 0)  # wanted by each large batch; the small ones are checked


def test_layers_shared_by_blocks(device: torch.device, calls: list[int]) -> None:
    model: Any = make("llama", torch.bfloat16, device)
    model.layers[1].mlp.up_proj = model.layers[0].mlp.up_proj
    model.layers[2].mlp.gate_proj = model.layers[0].mlp.up_proj
    compared(model, batches(), calls, CALLS)


def test_a_layer_called_before_the_model(device: torch.device, calls: list[int]) -> None:
    model = make("llama", torch.bfloat16, device)
    up_proj = model.get_submodule("layers.1.mlp.up_proj")

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        up_proj(torch.ones(3, 12, 64, dtype=torch.bfloat16, device=device))
        model(**batch, use_cache=False)

    compared(model, batches(), calls, CALLS, forward=forward)


def test_the_forward_of_linear_layers_replaced_on_the_class(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, calls: list[int]
) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight, self.bias).mul_(2))
    compared(make("llama", torch.bfloat16, device), batches(), calls, 0)


def test_hooks_on_all_modules_that_come_during_a_forward(device: torch.device, calls: list[int]) -> None:
    model, seen = make("llama", torch.bfloat16, device), []
    gate_proj = model.get_submodule("layers.1.mlp.gate_proj")

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: seen.append(1) if module is gate_proj else None
        )
        model(**batch, use_cache=False)
        handle.remove()

    compared(model, batches(), calls, 0, forward=forward)
    assert len(seen) == 4


def test_an_adapter_of_someones_own_is_asked(device: torch.device, calls: list[int]) -> None:
    model, batch = make("llama", torch.bfloat16, device), batches(1)[0]

    class Own(LinearAdapter):
        pass

    layers = [
        dataclasses.replace(layer, adapter=Own()) if layer.name == "layers.1.mlp.gate_proj" else layer
        for layer in discover(model).layers
    ]
    with Collector(model, layers) as collector, agreed(FastPath(model, collector)):
        collector.begin(3)
        hidden_states(model, batch, device)
        collector.end()
    assert len(calls) == 3


@pytest.mark.parametrize("case", ["last call only", "rows of no sample", "one matrix"])
def test_layers_that_only_hooks_can_read(case: str, device: torch.device, calls: list[int]) -> None:
    model, batch = make("phi3" if case == "one matrix" else "llama", torch.bfloat16, device), batches(1)[0]
    layers = discover(model).layers
    if case == "one matrix":
        layers = tuple(
            dataclasses.replace(layer, split=None) for layer in layers if layer.name.endswith("gate_up_proj.gate")
        )
        assert len(layers) == 4
    samples, last_call_only = 7 if case == "rows of no sample" else 3, case == "last call only"
    plain, fast = (
        observed(model, layers, batch, device, fast, samples=samples, last_call_only=last_call_only)
        for fast in (False, True)
    )
    assert calls == []
    torch.testing.assert_close(fast.totals(), plain.totals(), rtol=2 * TOLERANCE[torch.bfloat16], atol=0)
    assert plain.unassigned == fast.unassigned


@pytest.mark.parametrize("result", ["out", "gate_sumsq", "up_sumsq", "out_sumsq"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_kernel_that_computes_something_else_is_found_and_not_used(
    family: str, result: str, monkeypatch: pytest.MonkeyPatch, device: torch.device, calls: list[int]
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


def test_the_model_is_left_as_it_was(device: torch.device, calls: list[int]) -> None:
    model = make("phi3", torch.bfloat16, device)
    before = state(model)
    quietly(model, batches(), fast=True)
    assert len(calls) == CALLS
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
