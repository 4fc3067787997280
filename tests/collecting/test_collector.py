"""The collector: what it counts, what it reads once, and that it leaves the model alone. Values: test_scoring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plop_ext import Collector, ops, reference
from plop_ext.layers import discover
from plop_ext.totals import Totals
from tests.support import tiny_models
from tests.support.tiny_models import Plain
from tests.support.totals import assert_close


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
) -> tuple[Collector, Totals]:
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
        assert np.array_equal(collector.totals(), expected)
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
    assert float(totals.sum_gain[0].sum()) == pytest.approx(summed(model.layers[0], x), rel=1e-6)
    assert float(totals.sum_gain[1].sum()) == pytest.approx(summed(model.layers[1], changed), rel=1e-6)


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
    totals = collector.totals().of_samples(slice(len(x)))
    expected = float((features[0].norm(dim=-1) / x.double().norm(dim=-1)).sum())
    assert float(totals.sum_gain[0].sum()) == pytest.approx(expected, rel=1e-6)


def test_a_users_hook_that_replaces_the_output_runs_later() -> None:
    model, x = Plain(depth=1), torch.randn(2, 20, 16)
    model.layers[0].up.register_forward_hook(lambda module, args, output: output * 100)
    _, totals = collect(model, x)
    with torch.no_grad():
        assert float(totals.sum_gain[0].sum()) == pytest.approx(summed(model.layers[0].up, x), rel=1e-6)


def test_layers_that_take_time_first_get_the_mask_of_their_tokens() -> None:
    model = Seen(lambda layers, x: [layer(x.transpose(0, 1)) for layer in layers])
    x, mask = torch.randn(2, 20, 8), torch.zeros(2, 20, dtype=torch.bool)
    mask[0, :7], mask[1, 3:] = True, True
    collector, totals = collect(model, x, mask=mask)
    assert not collector.unassigned
    assert totals.tokens[0].tolist() == [7, 17]
    for sample in range(2):
        kept = x[sample, mask[sample]]
        for index, layer in enumerate(model.layers):
            assert float(totals.sum_gain[index, sample]) == pytest.approx(summed(layer, kept), rel=1e-6)


def count_ops(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each op runs from now on."""
    calls = {"row_sumsq_": 0, "row_sumsq_pair_": 0, "gain_totals_": 0}
    for name in calls:
        original = getattr(ops, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> None:
            calls[name] += 1
            original(*args)

        monkeypatch.setattr(ops, name, counted)
    return calls


def test_a_shared_input_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.llama(num_hidden_layers=3)
    found = discover(model).layers
    calls = count_ops(monkeypatch)
    with torch.no_grad(), Collector(model, found) as collector:
        collector.begin(2)
        model(input_ids=torch.randint(3, 60, (2, 20)))
        collector.end()
    # q, o, gate and down read their input and output in one call; k, v and up only their output.
    assert calls == {"row_sumsq_pair_": 3 * 4, "row_sumsq_": 3 * 3, "gain_totals_": 1}


def test_an_input_of_another_type_than_the_output_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Seen(lambda layers, x: [layer(x) for layer in layers]), torch.randn(2, 20, 8)
    calls = count_ops(monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, totals = collect(model, x)
    assert calls == {"row_sumsq_pair_": 0, "row_sumsq_": 3, "gain_totals_": 1}
    assert float(totals.sum_gain[1].sum()) == pytest.approx(summed(model.layers[1], x), rel=1e-2)


def test_batches_under_other_grad_modes_and_of_other_lengths_are_bitwise_identical(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The buffer and its views outlive a batch."""
    model, x = tiny_models.llama().model, torch.randint(3, 60, (3, 33))
    _, expected = collect(model, x)
    _, shorter = collect(model, x[:, :20])
    for kept in (4096, 5):
        monkeypatch.setattr("plop_ext.collecting.arena._KEPT_VIEWS", kept)
        with Collector(model, discover(model).layers) as collector:
            for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad(), torch.inference_mode()):
                for batch in (x, x[:, :20]):
                    with mode:
                        collector.begin(len(batch))
                        model(batch)
                        collector.end()
        for start in range(0, 24, 6):
            assert np.array_equal(collector.totals().of_samples(slice(start, start + 3)), expected)
            assert np.array_equal(collector.totals().of_samples(slice(start + 3, start + 6)), shorter)


def test_equal_inputs_that_are_not_one_tensor_are_read_each() -> None:
    model, x = (
        Seen(lambda layers, x: [layer(x * (1 + index)) for index, layer in enumerate(layers)]),
        torch.randn(2, 20, 8),
    )
    _, totals = collect(model, x)
    assert float(totals.sum_gain[1].sum()) == pytest.approx(summed(model.layers[1], x), rel=1e-6)


def test_a_module_called_twice_adds_both_calls_or_keeps_the_last() -> None:
    model, x = Seen(lambda layers, x: layers[0](torch.relu(layers[1](layers[0](x))))), torch.randn(2, 20, 8)
    first, second = model.layers
    with torch.no_grad():
        later = torch.relu(second(first(x)))
    _, totals = collect(model, x, x)
    assert totals.values.shape == (2, 4, 5) and totals.tokens[0].tolist() == [40] * 4
    assert float(totals.sum_gain[0, :2].sum()) == pytest.approx(summed(first, x, later), rel=1e-6)
    _, totals = collect(model, x, last_call_only=True)
    assert totals.tokens[0].tolist() == totals.tokens[1].tolist() == [20, 20]
    assert float(totals.sum_gain[0].sum()) == pytest.approx(summed(first, later), rel=1e-6)


SHAPES = [((4, 8), [1, 1, 1, 1]), ((4, 3, 8), [3] * 4), ((4, 3, 2, 8), [6] * 4), ((2, 2, 3, 5, 8), [30, 30])]


@pytest.mark.parametrize("shape, tokens", SHAPES, ids=str)
def test_inputs_of_two_and_more_dimensions(shape: tuple[int, ...], tokens: list[int], device: torch.device) -> None:
    model, x = Seen(lambda layers, x: [layer(x) for layer in layers]).to(device), torch.randn(shape, device=device)
    _, totals = collect(model, x)
    assert totals.tokens[0].tolist() == tokens
    assert float(totals.sum_gain[1].sum()) == pytest.approx(summed(model.layers[1], x), rel=1e-5)


def test_inputs_whose_axes_cannot_be_merged(device: torch.device) -> None:
    model = Seen(lambda layers, x: [layer(x.transpose(1, 2)) for layer in layers]).to(device)
    x = torch.randn(2, 3, 5, 8, device=device)
    _, totals = collect(model, x)
    assert float(totals.sum_gain[0, 1]) == pytest.approx(summed(model.layers[0], x[1]), rel=1e-5)


def test_a_vector_is_the_only_token_of_the_only_sample() -> None:
    model = Seen(lambda layers, x: [layer(x[0]) for layer in layers])
    x = torch.randn(1, 8)
    _, totals = collect(model, x)
    assert totals.tokens[0].tolist() == [1]


def test_keyword_inputs() -> None:
    model, x = Seen(lambda layers, x: [layer(input=x) for layer in layers]), torch.randn(2, 20, 8)
    _, totals = collect(model, x)
    assert float(totals.sum_gain[0].sum()) == pytest.approx(summed(model.layers[0], x), rel=1e-6)


def test_pooled_rows_count_once_per_sample() -> None:
    model = Seen(lambda layers, x: layers[1](layers[0](x)[:, 0]))
    collector, totals = collect(model, torch.randn(3, 20, 8), mask=torch.ones(3, 20))
    assert totals.tokens[0].tolist() == [20] * 3 and totals.tokens[1].tolist() == [1] * 3
    assert not collector.unassigned


def test_rows_that_no_sample_owns_are_named() -> None:
    model = Seen(lambda layers, x: layers[1](layers[0](x).reshape(-1, 8)[:-1]))
    collector, totals = collect(model, torch.randn(3, 20, 8), mask=torch.ones(3, 20))
    assert collector.unassigned == {"layers.1": "its 59 input rows cannot be assigned to 3 samples"}
    assert totals.seen[1].sum() == 0 and totals.tokens[0].tolist() == [20] * 3


@pytest.mark.parametrize("elements", [64, 200, 500])
def test_an_arena_that_overflows_or_grows_is_bitwise_identical(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny_models.llama().model, torch.randint(3, 60, (3, 33))
    _, expected = collect(model, x)
    monkeypatch.setattr("plop_ext.collecting.arena._ARENA_ELEMENTS", elements)  # a call takes 2 * 99
    calls = count_ops(monkeypatch)
    _, totals = collect(model, x, x[:1], x)
    assert calls["gain_totals_"] > 6
    for part in (slice(3), slice(4, None)):
        assert np.array_equal(totals.of_samples(part), expected)


def test_layers_of_other_widths_and_types_share_a_forward() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 5), nn.Linear(5, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).double())

    model, x = Mixed(), torch.randn(2, 20, 8)
    _, totals = collect(model, x)
    with torch.no_grad():
        inner = model.a(x).double()
    assert float(totals.sum_gain[0].sum()) == pytest.approx(summed(model.a, x), rel=1e-6)
    assert float(totals.sum_gain[1].sum()) == pytest.approx(summed(model.b, inner), rel=1e-12)


def test_gradients_flow_through_hooked_layers() -> None:
    model, x = Plain(), torch.randn(2, 20, 16, requires_grad=True)
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    with Collector(model, discover(model).layers) as collector:
        collector.begin(2)
        model(x).sum().backward()
        collector.end()
    assert x.grad is not None and torch.equal(x.grad, expected)
    assert not collector.recording.queue.all().requires_grad


def test_an_unannounced_forward_does_not_count() -> None:
    model, x = Plain(), torch.randn(2, 20, 16)
    with torch.no_grad(), Collector(model, discover(model).layers) as collector:
        model(x)
        collector.begin(2)
        model(x)
        collector.end()
        model(x)
    assert np.array_equal(collector.totals(), collect(model, x)[1])


def test_a_collector_goes_on_after_a_forward_that_failed() -> None:
    model, x = Plain(), torch.randn(2, 20, 16)
    with torch.no_grad(), Collector(model, discover(model).layers) as collector:
        collector.begin(2)
        with pytest.raises(RuntimeError, match="shape"):
            model(torch.randn(2, 20, 16) @ torch.randn(16, 7))
        collector.begin(2)
        model(x)
        collector.end()
    assert np.array_equal(collector.totals(), collect(model, x)[1])
    assert not any(module._forward_hooks for module in model.modules())


def test_no_batch_is_an_empty_table_and_end_needs_begin() -> None:
    model = Plain()
    collector = Collector(model, discover(model).layers)
    assert collector.totals().values.shape == (4, 0, 5)
    with pytest.raises(AssertionError, match="begin"):
        collector.end()


def test_samples_without_a_layers_call_are_rows_of_zeros() -> None:
    model = Seen(lambda layers, x: layers[0](x) if len(x) > 1 else layers[1](x))
    _, totals = collect(model, torch.randn(2, 20, 8), torch.randn(1, 20, 8))
    assert totals.tokens.tolist() == [[20, 20, 0], [0, 0, 20]]


@pytest.mark.gpu
@pytest.mark.parametrize("places", [("cpu", "cuda"), ("cuda", "cpu")], ids=str)
def test_layers_on_the_host_and_on_a_device(places: tuple[str, str]) -> None:
    def use(layers: nn.ModuleList, x: Tensor) -> None:
        for layer in layers:
            place = layer.weight.device
            if place.type == "cuda":
                torch.cuda._sleep(100_000_000)  # whoever does not wait for a copy from here reads nothing
            layer(x.to(place))

    model, x = Seen(use), torch.randn(3, 20, 8)
    expected = collect(model, x)[1]
    for layer, place in zip(model.layers, places, strict=True):
        layer.to(place)
    assert_close(collect(model, x, x)[1], Totals.join_samples([expected, expected]), rtol=1e-5)
