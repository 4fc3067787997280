"""Probes: the inputs that a module sees, and the gain taken from them. Their expectation: test_baseline."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext.layers import LayerAdapter, LinearLayer, Split, discover
from plop_ext.layers.experts import ExpertsAdapter
from plop_ext.lora_target import LoraTarget
from plop_ext.scoring.baseline import probe_baselines
from tests.support import tiny_models


class Spy(LayerAdapter):
    """Keeps the inputs, and applies the module's weight in its dtype."""

    weights = "dequantized"

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def probe(self, module: nn.Module, z: Tensor) -> Tensor:
        self.seen.append(z)
        return module(z)


def layer_of(module: nn.Linear, adapter: LayerAdapter, name: str = "0.up") -> LinearLayer:
    target = LoraTarget.of_module(name, module.in_features, module.out_features)
    return LinearLayer(name, "up", 0, module.in_features, module.out_features, module, adapter, target)


def mean_gain(weight: Tensor, z: Tensor) -> float:
    z = z.double()
    return float(((z @ weight.detach().double().T).norm(dim=1) / z.norm(dim=1)).mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_inputs_are_those_of_a_normalized_activation(dtype: torch.dtype) -> None:
    module, spy = nn.Linear(12, 7).to(dtype), Spy()
    (value,) = probe_baselines([layer_of(module, spy)], probes=5, seed=3)
    (z,) = spy.seen
    assert z.shape == (5, 12) and z.dtype == dtype and not z.requires_grad
    torch.testing.assert_close(z.double().square().mean(dim=1), torch.ones(5, dtype=torch.float64), rtol=1e-2, atol=0)
    assert value == pytest.approx(mean_gain(module.weight, z), rel=2e-2 if dtype == torch.bfloat16 else 1e-6)


def test_seed_and_name_of_a_module_decide_its_inputs() -> None:
    spy = Spy()
    module = nn.Linear(2, 2)
    for name, seed in (("0.up", 3), ("0.up", 3), ("1.up", 3), ("0.up", 4)):
        probe_baselines([layer_of(module, spy, name)], probes=2, seed=seed)
    first, again, other, seeded = spy.seen
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, seeded)
    # Baselines of earlier versions are those of this one.
    assert first.flatten().tolist() == pytest.approx([-1.413349, 0.049456, -1.374267, 0.333754], rel=1e-5)


def test_the_inputs_are_on_the_device_of_the_module() -> None:
    spy = Spy()
    module = nn.Linear(3, 2, device="meta")

    def refuse(z: Tensor) -> Tensor:
        raise RuntimeError("no values")

    module.forward = refuse
    (value,) = probe_baselines([layer_of(module, spy)], probes=4, seed=0)
    assert math.isnan(value) and spy.seen[0].device.type == "meta"


def test_a_bias_of_another_dtype_is_left_out() -> None:
    module, spy = nn.Linear(12, 7), Spy()
    module.bias.data = torch.randn(7) * 3
    expected = probe_baselines([layer_of(module, spy)], probes=8, seed=0)

    class Wide(Spy):
        def bias(self, module: nn.Module) -> Tensor:
            return module.bias.double()

    assert probe_baselines([layer_of(module, Wide())], probes=8, seed=0) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx([mean_gain(module.weight, spy.seen[0])], rel=1e-5)


def test_a_module_that_refuses_such_inputs_has_no_baseline() -> None:
    class Refusing(Spy):
        def probe(self, module: nn.Module, z: Tensor) -> Tensor:
            raise RuntimeError("int8 only")

    class Broken(Refusing):
        weights = "weight"

    advanced: list[int] = []
    linear = nn.Linear(2, 2)
    layers = [layer_of(linear, Spy()), layer_of(nn.Linear(2, 2), Refusing()), layer_of(nn.Linear(2, 2), Spy())]
    values = probe_baselines(layers, probes=4, seed=0, advance=advanced.append)
    assert [value > 0 for value in values] == [True, False, True] and math.isnan(values[1]) and advanced == [1] * 3
    with pytest.raises(RuntimeError, match="int8 only"):
        probe_baselines([layer_of(linear, Broken())], probes=4, seed=0)


def test_the_parts_of_a_packed_module_share_its_inputs() -> None:
    module, spy = nn.Linear(4, 6), Spy()
    split = Split(("a", "b"), (1, 2))  # two groups: a b b a b b
    rows = {"a": [0, 3], "b": [1, 2, 4, 5]}
    parts = [
        LinearLayer(
            f"0.ab.{name}", name, 0, 4, len(rows[name]), module, spy, LoraTarget.of_module("0.ab", 4, 6), i, split
        )
        for i, name in enumerate(rows)
    ]
    nn.init.normal_(module.bias, std=3.0)
    values = probe_baselines(parts, probes=5, seed=1)
    (z,) = spy.seen
    assert values == pytest.approx([mean_gain(module.weight[places], z) for places in rows.values()], rel=1e-5)
    assert probe_baselines(parts[1:], probes=5, seed=1) == values[1:]
    probe_baselines([layer_of(nn.Linear(4, 2), spy, "0.ab")], probes=5, seed=1)
    assert torch.equal(spy.seen[-1], z)
    module.bias = None
    assert probe_baselines(parts, probes=5, seed=1) == pytest.approx(values, rel=1e-5)


def test_each_expert_has_inputs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer for layer in discover(tiny_models.mixtral()).layers if layer.adapter.routed and layer.layer == 0]
    names = [layer.name.partition("experts.")[2] for layer in layers]
    assert names == [f"{expert}.{kind}_proj" for kind in ("gate", "up", "down") for expert in (0, 1)]
    module: Any = layers[0].module
    inner = tiny_models.INNER
    weights = [*module.gate_up_proj[:, :inner], *module.gate_up_proj[:, inner:], *module.down_proj]
    seen: list[Tensor] = []
    probe_part = ExpertsAdapter.probe_part

    def spy(self: ExpertsAdapter, module: nn.Module, part: int, z: Tensor) -> Tensor:
        seen.append(z)
        return probe_part(self, module, part, z)

    monkeypatch.setattr(ExpertsAdapter, "probe_part", spy)
    values = probe_baselines(layers, probes=6, seed=1)
    expected = [mean_gain(weight, z) for weight, z in zip(weights, seen, strict=True)]
    assert values == pytest.approx(expected, rel=1e-5)
    assert [z.shape[1] for z in seen] == [layer.in_features for layer in layers]
    assert not torch.equal(seen[0], seen[1])
    named = Spy()
    probe_baselines([layer_of(nn.Linear(tiny_models.HIDDEN, 2), named, layers[1].name)], probes=6, seed=1)
    assert torch.equal(named.seen[0], seen[1])
