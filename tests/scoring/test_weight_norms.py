"""Weight norms: one per layer, NaN and a reason where the weight cannot be read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext.layers import LayerAdapter, LinearLayer, Split, Unsupported, discover
from plop_ext.lora_target import LoraTarget
from plop_ext.score_data.settings import Settings
from plop_ext.scoring import baseline
from plop_ext.scoring.baseline import compute_baselines, frobenius_baselines, frobenius_norms, probe_baselines


class Refusing(LayerAdapter):
    """Raises the error that its weight is."""

    weights = "dequantized"

    def part_sumsq(self, module: Any, split: Split | None) -> Tensor:
        raise module.error


class Refused(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def packed(module: nn.Module, adapter: LayerAdapter, names: str) -> list[LinearLayer]:
    """The parts of one packed module with 2 output columns each."""
    split = Split(tuple(names), (2,) * len(names))
    target = LoraTarget.of_module("w", 2, 2)
    return [
        LinearLayer(f"w.{name}", name, 0, 2, 2, module, adapter, target, part, split)
        for part, name in enumerate(names)
    ]


def diagonal(*values: float) -> nn.Module:
    module = nn.Linear(len(values), len(values))
    module.weight.data = torch.diag(torch.tensor(values))
    return module


def test_each_part_has_its_norm_and_each_module_is_read_once() -> None:
    advanced: list[int] = []
    model = nn.Sequential(diagonal(3.0, 4.0), nn.ReLU(), diagonal(0.0, 0.0))
    whole = nn.Linear(2, 6)
    whole.weight.data = torch.tensor([[1.0, 0], [0, 0], [2, 0], [0, 0], [0, 3], [0, 4]])
    layers = [*discover(model).layers, *packed(whole, LayerAdapter(), "qkv")]
    layers[-3:] = [
        LinearLayer(**{**vars(layer), "adapter": discover(model).layers[0].adapter}) for layer in layers[-3:]
    ]
    norms = frobenius_norms(layers, advanced.append)
    assert norms.values == [5.0, 0.0, 1.0, 2.0, 5.0] and norms.failures == {} and advanced == [1, 1, 3]
    assert frobenius_norms(layers[2:]).values == [1.0, 2.0, 5.0]
    # In another order, or only some of the parts.
    assert frobenius_norms(layers[:1:-2]).values == [5.0, 1.0]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Unsupported("of an unknown layout"), "of an unknown layout"),
        (TypeError("no kernel\nfor this"), "its weight cannot be read (TypeError: no kernel)"),
    ],
)
def test_weights_that_cannot_be_read(error: Exception, reason: str) -> None:
    (readable,) = discover(nn.Sequential(diagonal(3.0, 4.0))).layers
    norms = frobenius_norms([readable, *packed(Refused(error), Refusing(), "kv"), readable])
    assert norms.failures == {"w.k": reason, "w.v": reason}
    assert norms.values == pytest.approx([5.0, math.nan, math.nan, 5.0], nan_ok=True)


def test_an_error_with_an_ordinary_weight_is_not_hidden() -> None:
    class Broken(Refusing):
        weights = "weight"

    with pytest.raises(ZeroDivisionError):
        frobenius_norms(packed(Refused(ZeroDivisionError()), Broken(), "kv"))


def settings(kind: str) -> Settings:
    return Settings("all", kind, 8, None, (), "language", None, 1, seed=3)


def test_the_baseline_is_of_the_kind_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    @contextmanager
    def bar(*arguments: Any) -> Iterator[Any]:
        bars.append(arguments)
        yield bars.append

    monkeypatch.setattr(baseline, "progress_bar", bar)
    layers = discover(nn.Sequential(diagonal(3.0, 4.0), diagonal(1.0, 2.0))).layers
    norms = frobenius_norms(layers)
    frobenius = compute_baselines(layers, norms, settings("frobenius"), True)
    assert frobenius == frobenius_baselines(layers, norms.values) and bars == []
    expected = probe_baselines(layers, probes=8, seed=3)
    assert compute_baselines(layers, norms, settings("probe")) == expected
    assert compute_baselines(layers, norms, settings("probe"), True) == expected
    assert bars == [("probing", 2, False), 1, 1, ("probing", 2, True), 1, 1]


def test_frobenius_baselines_need_a_norm_of_each_layer() -> None:
    layers = discover(nn.Sequential(nn.Linear(144, 129), nn.Linear(129, 144))).layers
    assert frobenius_baselines(layers[:1], [6.0]) == [0.5]
    with pytest.raises(ValueError, match="zip"):
        frobenius_baselines(layers, [6.0])
