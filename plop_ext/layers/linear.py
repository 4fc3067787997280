"""`nn.Linear` and its subclasses that keep a plain floating-point weight."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from plop_ext.layers.adapter import Unsupported, register_adapter

_READABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@register_adapter
class LinearAdapter:
    """`y = z @ weight.T + bias` with weight [out_features, in_features]."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def check(self, module: nn.Module) -> None:
        linear = cast(nn.Linear, module)
        weight = linear.weight
        if weight.device.type == "meta":
            raise Unsupported("its weight is on the meta device (offloaded or not loaded)")
        # A quantized weight stored in an `nn.Linear` subclass, or a tensor subclass that dequantizes on use: its raw
        # values are codes, and their norm would be silently wrong.
        plain = type(weight) in (nn.Parameter, Tensor) or type(weight.data) is Tensor
        if not plain or weight.dtype not in _READABLE or weight.shape != (linear.out_features, linear.in_features):
            kind = f"{type(weight.data).__name__} of {str(weight.dtype).removeprefix('torch.')}"
            raise Unsupported(f"its weight is not a plain floating-point matrix ({kind})")

    def features(self, module: nn.Module) -> tuple[int, int]:
        linear = cast(nn.Linear, module)
        return linear.in_features, linear.out_features

    def weight_rows(self, module: nn.Module) -> Tensor:
        return cast(nn.Linear, module).weight

    def bias(self, module: nn.Module) -> Tensor | None:
        return cast(nn.Linear, module).bias

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else kwargs["input"]

    def output(self, output: Any) -> Tensor:
        return output
