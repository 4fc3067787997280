"""Which adapter serves a module depends on priorities, not on the order in which files are imported."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plop_ext.layers.adapter as registry
from plop_ext.layers import LayerAdapter, adapter_for, register_adapter
from plop_ext.layers.conv import ConvAdapter
from plop_ext.layers.linear import LinearAdapter, TransposedLinearAdapter
from plop_ext.layers.opaque import OpaqueAdapter
from plop_ext.layers.own_forward import OwnForwardAdapter
from plop_ext.layers.quantized import BitsAndBytes4bitAdapter


class Packed(nn.Module):
    """A linear layer of a format of its own, as GPTQ's."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 4
        self.codes = nn.Parameter(torch.randint(0, 16, (4, 8), dtype=torch.uint8), requires_grad=False)


class PackedAdapter(LayerAdapter):
    """What someone adds in a file of the package that sorts before `opaque.py`."""

    kind = "packed"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Packed)

    def features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def weight_rows(self, module: Any) -> Tensor:
        return module.codes.float()


@pytest.fixture
def built_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[type[LayerAdapter]]]:
    """The package's adapters, of which the registry is emptied meanwhile."""
    classes = [type(adapter) for adapter in registry._ADAPTERS]
    monkeypatch.setattr(registry, "_ADAPTERS", [])
    yield classes


def test_an_adapter_that_is_imported_before_the_fallback_is_asked_before_it(
    built_in: list[type[LayerAdapter]],
) -> None:
    assert built_in[-1] is OpaqueAdapter
    for adapter in (PackedAdapter, *built_in):
        register_adapter(adapter)
    assert type(adapter_for(Packed())) is PackedAdapter


def test_the_fallback_takes_what_no_other_adapter_claims(built_in: list[type[LayerAdapter]]) -> None:
    for adapter in built_in:
        register_adapter(adapter)
    assert type(adapter_for(Packed())) is OpaqueAdapter
    assert type(adapter_for(nn.Linear(8, 4))) is LinearAdapter
    assert adapter_for(nn.ReLU()) is None


@pytest.mark.parametrize("seed", range(5))
def test_a_quantized_subclass_of_linear_is_its_own_adapters_in_any_order(
    seed: int, built_in: list[type[LayerAdapter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is quantized its weight is an ordinary one, which the adapter of `nn.Linear` would read."""

    class Linear4bit(nn.Linear):
        pass

    library = ModuleType("bitsandbytes.nn")
    library.Linear4bit = Linear4bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", library)
    for adapter in random.Random(seed).sample(built_in, len(built_in)):
        register_adapter(adapter)
    assert type(adapter_for(Linear4bit(8, 4))) is BitsAndBytes4bitAdapter
    assert type(adapter_for(nn.Linear(8, 4))) is LinearAdapter
    assert type(adapter_for(Packed())) is OpaqueAdapter


def test_of_equal_priority_the_latest_registered_is_asked_first(built_in: list[type[LayerAdapter]]) -> None:
    class Later(PackedAdapter):
        pass

    class Above(PackedAdapter):
        priority = 1

    for adapter in (PackedAdapter, Later, OpaqueAdapter):
        assert register_adapter(adapter) is adapter
    assert type(adapter_for(Packed())) is Later
    for adapter in (Above, PackedAdapter):
        register_adapter(adapter)
    assert type(adapter_for(Packed())) is Above


def test_the_documented_priorities() -> None:
    priorities = {type(adapter): adapter.priority for adapter in registry._ADAPTERS}
    assert {priorities.pop(kind) for kind in (LinearAdapter, TransposedLinearAdapter, ConvAdapter)} == {-10}
    assert priorities.pop(OwnForwardAdapter) == -5 and priorities.pop(OpaqueAdapter) == -100
    assert set(priorities.values()) == {LayerAdapter.priority} == {0}
