"""Where the fast path must make gate and up as they are: scores stay those of the hooks, without the kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plop_ext import Collector, ops
from plop_ext.forwards.fast import FastPath, kernels
from plop_ext.layers import discover
from plop_ext.layers.linear import LinearAdapter
from tests.support.fast_models import TOLERANCE, batches, hidden_states, make, needs_native
from tests.support.projection import CALLS, agreed, compared, observed
from tests.support.quiet import quietly
from tests.support.totals import assert_close

pytestmark = needs_native


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
def test_other_layers_are_called(
    change: Callable[[nn.Module], None], device: torch.device, projections: list[int]
) -> None:
    model = make("llama", torch.bfloat16, device)
    change(model)
    compared(model, batches(), projections, 2 + 3)


@pytest.mark.parametrize("family, dtype", [("llama_biased", torch.bfloat16), ("llama", torch.float32)])
def test_models_with_biases_and_float32_keep_the_products(
    family: str, dtype: torch.dtype, device: torch.device, projections: list[int]
) -> None:
    compared(make(family, dtype, device), batches(), projections, 0)


def test_few_tokens_keep_the_products(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, projections: list[int]
) -> None:
    model, data = make("llama", torch.bfloat16, device), batches()
    for rows, expected in ((36, CALLS), (37, 0)):  # 3 samples of 12 tokens
        monkeypatch.setattr(kernels, "_PROJECTED_ROWS", rows)
        compared(model, data, projections, expected)


def test_a_device_without_the_kernel_keeps_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PROJECTED_ROWS", 1)
    monkeypatch.setattr(ops, "gated_projection_", None)
    assert not ops.has_gated_projection(torch.device("cpu"))
    model, data = make("llama", torch.bfloat16), batches()
    assert quietly(model, data, fast=True).provenance["fast"] == {"blocks": 4, "reason": None}


def test_layers_under_lora_are_called(device: torch.device, projections: list[int]) -> None:
    import peft

    model = make("llama", torch.bfloat16, device)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*layers\.2\.mlp\.gate_proj"))
    compared(adapted, batches(), projections, 2 + 3)


@pytest.mark.parametrize("before", [True, False], ids=["pre-hook", "hook"])
def test_hooks_that_come_during_a_forward_are_called(
    before: bool, device: torch.device, projections: list[int]
) -> None:
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
    projections.clear()
    fast = quietly(model, data, forward=hooked, fast=True)
    assert fast.provenance["fast"] == {"blocks": 4, "reason": None}
    assert len(seen) == len(data)
    assert len(projections) == 2 + 3
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=2 * TOLERANCE[torch.bfloat16])


def test_a_weight_of_another_class_that_is_not_scored(device: torch.device, projections: list[int]) -> None:
    model = make("llama", torch.bfloat16, device)
    of_another_class(model)
    layers = [layer for layer in discover(model).layers if layer.name.endswith("q_proj")]
    observed(model, layers, batches(1)[0], device, True)
    assert len(projections) == 3


def test_another_collector_on_the_model_keeps_its_hooks(device: torch.device, projections: list[int]) -> None:
    model, data = make("llama", torch.bfloat16, device), batches(1)
    totals: list[Tensor] = []

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        with Collector(model, discover(model).layers) as other:
            other.begin(3, batch["attention_mask"].bool())
            model(**batch, use_cache=False)
            other.end()
        totals.append(other.recording.queue.all())

    plain = quietly(model, data, forward=forward)
    fast = quietly(model, data, forward=forward, fast=True)
    assert projections == []
    np.testing.assert_allclose(fast.totals, plain.totals, rtol=2 * TOLERANCE[torch.bfloat16])
    torch.testing.assert_close(totals[-1], totals[0], rtol=2 * TOLERANCE[torch.bfloat16], atol=0)


def test_the_forward_of_linear_layers_replaced_on_the_class(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, projections: list[int]
) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: nn.functional.linear(x, self.weight, self.bias).mul_(2))
    compared(make("llama", torch.bfloat16, device), batches(), projections, 0)


def test_hooks_on_all_modules_that_come_during_a_forward(device: torch.device, projections: list[int]) -> None:
    model, seen = make("llama", torch.bfloat16, device), []
    gate_proj = model.get_submodule("layers.1.mlp.gate_proj")

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: seen.append(1) if module is gate_proj else None
        )
        model(**batch, use_cache=False)
        handle.remove()

    compared(model, batches(), projections, 0, forward=forward)
    assert len(seen) == 4


def test_an_adapter_of_someones_own_is_asked(device: torch.device, projections: list[int]) -> None:
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
    assert len(projections) == 3


@pytest.mark.parametrize("case", ["last call only", "rows of no sample", "one matrix"])
def test_layers_that_only_hooks_can_read(case: str, device: torch.device, projections: list[int]) -> None:
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
    assert projections == []
    assert_close(fast.totals(), plain.totals(), rtol=2 * TOLERANCE[torch.bfloat16])
    assert plain.unassigned == fast.unassigned
