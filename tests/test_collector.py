"""The collector: what it counts, what it reads once, and that it leaves the model alone. Values: test_scoring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext import Collector, reference
from plop_ext.layers import discover
from tests.tiny_models import Plain


class Seen(nn.Module):
    """Runs `use(layers, x)`, whatever that is, with two bias-free layers."""

    def __init__(self, use: Callable[[nn.ModuleList, Tensor], Any], width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(2)])
        self._use = use

    def forward(self, x: Tensor) -> Any:
        return self._use(self.layers, x)


def collect(
    model: nn.Module, *batches: Tensor, mask: Tensor | None = None, last_call_only: bool = False
) -> tuple[Collector, Tensor]:
    """The collector and its totals after a forward on each of `batches`."""
    with torch.no_grad(), Collector(model, discover(model).layers, last_call_only=last_call_only) as collector:
        for batch in batches:
            collector.begin(len(batch), mask)
            model(batch)
            collector.end()
    return collector, collector.totals()


def summed(layer: nn.Module, *inputs: Tensor) -> float:
    """Sum of the oracle's gains over the rows of `inputs`."""
    return sum(float(reference.token_gains(layer.weight, x).sum()) for x in inputs)


@pytest.mark.parametrize("regional", [True, False], ids=["regional", "whole"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["torch.compile(module)", "module.compile()"])
def test_a_model_compiled_and_run_before_is_scored_and_stays_compiled(wrapped: bool, regional: bool) -> None:
    compilations = 0

    def backend(graph: Any, example_inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph

    model, x = Plain().eval(), torch.randn(3, 20, 16)
    expected = collect(model, x)[1]
    inner: nn.Module = model.layers[0] if regional else model
    if not wrapped:
        inner.compile(backend=backend)
        called: Any = model
    elif regional:
        called = model
        model.layers[0] = torch.compile(model.layers[0], backend=backend)
    else:
        called = torch.compile(model, backend=backend)
    with torch.no_grad():
        called(x)
        assert compilations == 1
        attributes = [dict(vars(module)) for module in called.modules()]
        found = discover(called).layers
        assert {layer.type for layer in found} == {"up", "down"}
        with Collector(called, found) as collector:
            collector.begin(3)
            called(x)
            collector.end()
        assert torch.equal(collector.totals(), expected)
        assert [dict(vars(module)) for module in called.modules()] == attributes
        called(x)
    assert compilations == 1


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_an_input_modified_between_two_uses_is_read_again(inference: bool) -> None:
    def use(layers: nn.ModuleList, x: Tensor) -> None:
        layers[0](x)
        x[..., :4].mul_(100)
        layers[1](x)

    model, x = Seen(use), torch.randn(2, 20, 8)
    changed = x.clone()
    changed[..., :4] *= 100
    with torch.inference_mode(inference):
        _, totals = collect(model, x.clone())
    assert float(totals[0, :, 0].sum()) == pytest.approx(summed(model.layers[0], x), rel=1e-6)
    assert float(totals[1, :, 0].sum()) == pytest.approx(summed(model.layers[1], changed), rel=1e-6)


def test_the_bias_that_autocast_rounded_is_the_one_subtracted() -> None:
    model, x = Plain(depth=1), torch.randn(4, 64, 16)
    nn.init.normal_(model.layers[0].up.bias, std=30.0)
    features: list[Tensor] = []
    up = model.layers[0].up
    up.register_forward_hook(lambda m, a, y: features.append(y.double() - m.bias.detach().bfloat16().double()))
    with torch.no_grad(), Collector(model, discover(model).layers) as collector:
        for enabled in (True, False):  # in one run: the bias must follow the output's type
            collector.begin(len(x))
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model(x)
            collector.end()
    totals = collector.totals()[:, : len(x)]
    expected = float((features[0].norm(dim=-1) / x.double().norm(dim=-1)).sum())
    assert float(totals[0, :, 0].sum()) == pytest.approx(expected, rel=1e-6)


def test_a_users_hook_that_replaces_the_output_runs_later() -> None:
    model, x = Plain(depth=1), torch.randn(2, 20, 16)
    model.layers[0].up.register_forward_hook(lambda module, args, output: output * 100)
    _, totals = collect(model, x)
    with torch.no_grad():
        assert float(totals[0, :, 0].sum()) == pytest.approx(summed(model.layers[0].up, x), rel=1e-6)


def test_layers_that_take_time_first_get_the_mask_of_their_tokens() -> None:
    model = Seen(lambda layers, x: [layer(x.transpose(0, 1)) for layer in layers])
    x, mask = torch.randn(2, 20, 8), torch.zeros(2, 20, dtype=torch.bool)
    mask[0, :7], mask[1, 3:] = True, True
    collector, totals = collect(model, x, mask=mask)
    assert not collector.unmasked
    assert totals[0, :, 2].tolist() == [7, 17]
    for sample in range(2):
        kept = x[sample, mask[sample]]
        for index, layer in enumerate(model.layers):
            assert float(totals[index, sample, 0]) == pytest.approx(summed(layer, kept), rel=1e-6)
