"""Modules of any shape: no adapter raises when it is asked whether it knows one, and one odd module stops no run."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext import InputError
from plop_ext.layers import discover
from plop_ext.layers.adapter import _ADAPTERS
from tests.support.quiet import quietly

NAMES = ("weight", "in_features", "out_features", "down_proj", "config", "num_experts", "quantization_status", "bias")


class Raising(nn.Module):
    """Every attribute that an adapter may ask for is a property that raises."""


def refuse(self: nn.Module) -> Any:
    raise RuntimeError("not now")


for name in NAMES:
    setattr(Raising, name, property(refuse))


class RaisingLinear(nn.Linear):
    weight: Any = property(refuse)

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = 4, 4


def without_weight() -> nn.Module:
    linear = nn.Linear(4, 4)
    del linear.weight
    return linear


def with_weight(value: Any, cls: Callable[..., nn.Module] = nn.Linear) -> nn.Module:
    """A layer whose weight is an attribute of another kind."""
    layer = cls(4, 4, 1) if cls is nn.Conv1d else cls(4, 4)
    del layer.weight
    layer.__dict__["weight"] = value
    return layer


def compressed(weight: Tensor | None) -> nn.Module:
    """A linear layer as compressed-tensors leaves it until the first forward."""
    layer = without_weight()
    layer.register_parameter("weight_packed", nn.Parameter(torch.zeros(4, 1, dtype=torch.int32), requires_grad=False))
    if weight is not None:
        layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.quantization_status = types.SimpleNamespace(value="compressed")
    return layer


def experts(down: Any) -> nn.Module:
    import transformers.integrations.moe  # noqa: F401

    module = nn.Module()
    module.down_proj = down
    module.num_experts = module.has_gate = module.has_bias = module.is_transposed = module.config = 2
    return module


def transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(4, 4)
    del layer.weight
    return layer


ODD: dict[str, Callable[[], nn.Module]] = {
    "properties that raise": Raising,
    "a linear layer whose weight raises": RaisingLinear,
    "no weight": without_weight,
    "weight None": lambda: with_weight(None),
    "weight a string": lambda: with_weight("weight"),
    "weight a method": lambda: with_weight(lambda: None),
    "weight a list": lambda: with_weight([[1.0]]),
    "weight a scalar": lambda: with_weight(torch.tensor(1.0)),
    "weight of another shape": lambda: with_weight(torch.zeros(3, 5, 7)),
    "weight on meta": lambda: nn.Linear(4, 4, device="meta"),
    "float8 weight without a scale": lambda: with_weight(torch.zeros(4, 4).to(torch.float8_e4m3fn)),
    "lazy": lambda: nn.LazyLinear(4),
    "a convolution without a weight": lambda: with_weight(None, nn.Conv1d),
    "a lazy convolution": lambda: nn.LazyConv1d(4, 1),
    "a transposed layer without a weight": transposed,
    "compressed, without a weight": lambda: compressed(None),
    "compressed, with codes": lambda: compressed(torch.zeros(4, 4).to(torch.float8_e4m3fn)),
    "experts without weights": lambda: experts(None),
    "experts that are lists": lambda: experts([1, 2]),
    "experts of two dimensions": lambda: experts(torch.zeros(2, 2)),
    "experts without a first projection": lambda: experts(torch.zeros(2, 4, 4)),
    "sizes that are no numbers": lambda: _sized("four"),
    "sizes that are None": lambda: _sized(None),
    "nothing": nn.Module,
    "uninitialized": lambda: nn.Module.__new__(nn.Module),
}


def _sized(size: Any) -> nn.Module:
    module = nn.Identity()
    module.in_features = module.out_features = size
    return module


class Model(nn.Module):
    """A linear layer that is called, and an odd module that is not."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.odd = odd
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("name", ODD)
def test_no_adapter_raises_for_any_module(name: str) -> None:
    module = ODD[name]()
    for adapter in _ADAPTERS:
        assert adapter.matches(module) in (True, False), adapter


@pytest.mark.parametrize("name", [name for name in ODD if name != "uninitialized"])
def test_an_odd_module_stops_no_run(name: str) -> None:
    model = Model(ODD[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = quietly(model, [torch.randn(2, 20, 8)])
    assert scores.module_names == ("linear",)


def test_every_adapter_of_the_package_is_asked() -> None:
    """The adapters of libraries that are not installed too: they look their classes up among the loaded modules."""
    import plop_ext.layers as layers

    files = {type(adapter).__module__ for adapter in _ADAPTERS}
    registered = {
        name
        for name, module in sys.modules.items()
        if name.startswith(layers.__name__) and "register_adapter" in vars(module)
    } - {layers.__name__, f"{layers.__name__}.adapter"}
    assert registered <= files


@pytest.mark.parametrize("name", ["compressed, without a weight", "compressed, with codes"])
def test_a_compressed_model_is_refused_with_what_to_do(name: str) -> None:
    message = (
        r"no linear layer to score; not scored: Linear \(its weights are compressed; load it with `quantization_conf"
    )
    with pytest.raises(InputError, match=message):
        discover(nn.Sequential(ODD[name]()))
