"""Block-diagonal linear layers of transformers: [..., G, K / G] to [..., G, M / G], one block for each group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from plop_ext.layers.adapter import LayerAdapter, register_adapter
from plop_ext.layers.linear import check_in_place
from plop_ext.layers.quantized import FP8LinearAdapter
from plop_ext.layers.walk import plain_class

_CLASSES = ("DeepseekV4GroupedLinear", "FP8GroupedLinear")


@register_adapter
class GroupedLinearAdapter(LayerAdapter):
    """DeepSeek-V4's `o_a_proj`, in floating point and in FP8: W is the block-diagonal matrix, and z a whole token.

    The weight [M, K / G] holds the blocks one below the other.
    """

    kind = "block-diagonal linear"

    def matches(self, module: nn.Module) -> bool:
        kind = plain_class(module)
        return kind.__name__ in _CLASSES and kind.__module__.startswith("transformers.")

    def for_module(self, module: nn.Module) -> LayerAdapter:
        return self if plain_class(module).__name__ == _CLASSES[0] else _FP8

    def check(self, module: nn.Module) -> None:
        check_in_place(module)

    def features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.in_features * layer.n_groups, layer.out_features

    def blocks(self, module: nn.Module) -> int:
        layer: Any = module
        return layer.n_groups

    def weight_rows(self, module: nn.Module) -> Tensor:
        layer: Any = module
        return layer.weight

    def bias(self, module: nn.Module) -> Tensor | None:
        return None  # which the forward does not add

    def input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return super().input(module, args, kwargs).flatten(-2)

    def output(self, module: nn.Module, output: Any) -> Tensor:
        return output.flatten(-2)

    def probe(self, module: nn.Module, z: Tensor) -> Tensor:
        layer: Any = module
        return self.output(module, layer.forward(z.unflatten(-1, (layer.n_groups, -1))))

    def against_lora(self, module: nn.Module) -> str:
        return "PEFT cannot adapt a block-diagonal weight"


class _FP8GroupedLinearAdapter(GroupedLinearAdapter):
    """The blocks in FP8, with scales."""

    kind = FP8LinearAdapter.kind
    weights = "dequantized"

    def check(self, module: nn.Module) -> None:
        _PLAIN_FP8.check(module)

    def bias(self, module: nn.Module) -> Tensor | None:
        return _PLAIN_FP8.bias(module)

    def weight_chunks(self, module: nn.Module) -> Iterable[Tensor]:
        return _PLAIN_FP8.weight_chunks(module)

    def dtype(self, module: nn.Module) -> Any:
        return _PLAIN_FP8.dtype(module)


_PLAIN_FP8 = FP8LinearAdapter()
_FP8 = _FP8GroupedLinearAdapter()
