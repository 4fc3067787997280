"""`nn.Linear` and its subclasses that keep a plain floating-point weight, and transformers' transposed `Conv1D`."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from plop_ext import ops
from plop_ext.layers.adapter import LayerAdapter, Unsupported, register_adapter
from plop_ext.layers.attributes import check_weight, tensor
from plop_ext.layers.offload import is_offloaded, on_meta
from plop_ext.layers.parametrized import base_weight
from plop_ext.layers.sharded import shard_of, why_not_readable, without_style


def check_in_place(module: nn.Module) -> None:
    """Raise `Unsupported` for weights without values."""
    if on_meta(module) and not is_offloaded(module):
        raise Unsupported("its weight is on the meta device and was never loaded")
    reason = why_not_readable(module)
    if reason:
        raise Unsupported(reason)


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether `module` is an `nn.Linear` whose weight is the floating-point matrix that it applies.

    The weight of a subclass may hold codes, and a tensor subclass may dequantize on use: the norm of the raw values
    would be silently wrong.
    """
    if not isinstance(module, nn.Linear):
        return False
    weight = tensor(module, "weight")
    if weight is None:
        return False
    plain = type(weight) in (nn.Parameter, Tensor) or type(weight.data) is Tensor or type(shard_of(weight)) is Tensor
    return plain and weight.dtype in ops.FLOATS and weight.shape == (module.out_features, module.in_features)


@register_adapter
class LinearAdapter(LayerAdapter):
    """`y = z @ weight.T + bias` with weight [out_features, in_features]."""

    # After `OwnForwardAdapter`, and the quantized subclasses of `nn.Linear`, whose weight is a plain one until they
    # quantize it.
    priority = -10
    divisible = True

    def matches(self, module: nn.Module) -> bool:
        return is_plain_linear(module)

    def check(self, module: nn.Module) -> None:
        check_in_place(module)

    def features(self, module: nn.Module) -> tuple[int, int]:
        linear = cast(nn.Linear, module)
        return linear.in_features, linear.out_features

    def weight_rows(self, module: nn.Module) -> Tensor:
        return cast(nn.Linear, module).weight

    def sums_shards(self, module: nn.Module) -> bool:
        return shard_of(self.weight_rows(module)) is not None

    def probe(self, module: nn.Module, z: Tensor) -> Tensor:
        forward = vars(module).get("forward")
        if forward is None or without_style(forward) is forward:
            return super().probe(module, z)
        return functional.linear(z, self.weight_rows(module), self.bias(module))

    def base_output(self, module: nn.Module, x: Tensor, output: Any) -> Any:
        if not module._modules:  # no parametrization; tested in every call
            return output
        weight = base_weight(module, "weight")
        if weight is None or type(module).forward is not nn.Linear.forward or weight.device != x.device:
            return super().base_output(module, x, output)
        with torch.no_grad():
            return functional.linear(x, weight, cast(nn.Linear, module).bias)


@register_adapter
class TransposedLinearAdapter(LayerAdapter):
    """transformers' `Conv1D` (GPT-2): `y = z @ weight + bias` with weight [in_features, out_features]."""

    kind = "Conv1D (transposed)"
    priority = -10  # after `OwnForwardAdapter`

    def matches(self, module: nn.Module) -> bool:
        home = sys.modules.get("transformers.pytorch_utils")
        return home is not None and isinstance(module, home.Conv1D)

    def check(self, module: nn.Module) -> None:
        check_weight(module)
        check_in_place(module)

    def features(self, module: nn.Module) -> tuple[int, int]:
        in_features, out_features = cast(torch.Size, cast(Any, module).weight.shape)
        return in_features, out_features

    def weight_rows(self, module: nn.Module) -> Tensor:
        return cast(Tensor, module.weight).T

    def against_lora(self, module: nn.Module) -> str:
        return ""


def is_plain_product(adapter: LayerAdapter) -> bool:
    """Return whether the adapter scores input and output unmodified, which only `LinearAdapter` guarantees."""
    return type(adapter) is LinearAdapter
