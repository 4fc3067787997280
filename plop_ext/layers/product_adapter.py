"""Modules that are scored on the product inside their forward, because its operands are not theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plop_ext.layers.adapter import LayerAdapter, Unsupported
from plop_ext.layers.conv import ConvAdapter, conv_rows, patch_sumsq
from plop_ext.layers.linear import check_in_place
from plop_ext.layers.parametrized import changed_by_peft
from plop_ext.layers.products import Product, observe, shares_memory

OWN_FORWARD = "own forward"
NO_PRODUCT = "its own forward is not a product with its weight"
# Largest relative difference between two ways to compute one product; float32 may run in TF32 on CUDA.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_TOLERANCE_TF32 = 2e-3


class ProductAdapter(LayerAdapter):
    """A module whose forward multiplies by a changed weight, changes its input, or works block by block.

    Args:
        plain: Adapter of the module's kind, which would read its weight, input and output.
        groups: Number of blocks on the diagonal of W; 1 for an ordinary matrix, and for convolutions.
        matrix: Function that returns W as the forward applies it, without scoring; None if W has to be the unchanged
            weight, because the forward could not be tried.
        against_lora: Why PEFT cannot adapt the module, if the adapter of its kind does not say so.
    """

    weights = "forward"

    def __init__(
        self,
        plain: LayerAdapter,
        groups: int = 1,
        matrix: Callable[[nn.Module], Tensor] | None = None,
        against_lora: str = "",
    ) -> None:
        self.kind = OWN_FORWARD if groups == 1 else "block-diagonal linear"
        self._plain = plain
        self._groups = groups
        self._matrix = matrix
        self._against_lora = against_lora

    def check(self, module: nn.Module) -> None:
        check_in_place(module)

    def features(self, module: nn.Module) -> tuple[int, int]:
        in_features, out_features = self._plain.features(module)
        return in_features * self._groups, out_features

    def blocks(self, module: nn.Module) -> int:
        return self._groups if self._groups > 1 else self._plain.blocks(module)

    def weight_rows(self, module: nn.Module) -> Tensor:
        """Return the rows of W; of a block-diagonal W the blocks one below the other, [M, K / groups]."""
        weight = self._weight(module)
        return weight.flatten(0, 1) if self._groups > 1 else weight.flatten(1)

    def bias(self, module: nn.Module) -> Tensor | None:
        """Return None, because each product brings the bias that it adds."""
        return None

    def probe(self, module: nn.Module, z: Tensor) -> Tensor:
        weight = self._weight(module)
        if self._groups > 1:
            return torch.einsum("pgk,gmk->pgm", z.unflatten(1, (self._groups, -1)), weight).flatten(1)
        if isinstance(self._plain, ConvAdapter):
            return self._plain.apply_to_patches(module, z, weight)
        return functional.linear(z, weight)

    def lora_size(self, module: nn.Module) -> int:
        return self._plain.lora_size(module) if self._groups == 1 else sum(self.features(module))

    def against_lora(self, module: nn.Module) -> str:
        return self._against_lora or self._plain.against_lora(module)

    def observe(self, module: nn.Module, run: Callable[[], Any], *, compare: bool) -> tuple[Any, Product | str]:
        """Run a forward; return its result, and its product, or why there is none to score.

        Args:
            module: The module.
            run: Its forward, with the arguments of the call.
            compare: Compare the product with the result, which synchronizes.
        """
        weight = kernel_of(self._plain, module)
        result, product = observe(weight, run)
        if changed_by_peft(module):
            return result, "PEFT adds LoRA to the weight within the forward; score the model without adapters"
        if product is None or (self._matrix is None and not shares_memory(product.weight, weight)):
            return result, NO_PRODUCT
        if compare and not returns_product(module, result, product):
            return result, NO_PRODUCT
        return result, product

    @property
    def untried(self) -> bool:
        """Whether only a call of the model can tell if the module returns its product."""
        return self._matrix is None

    def rows(self, product: Product, x: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return a product's inputs, their sums of squares if they are patches, its outputs and their bias.

        Args:
            product: The product of a call.
            x: The argument of the call, which tells the extents before those of the features, such as [B, T].
        """
        y, bias = product.output()
        if product.convolution is not None:
            kernel = product.weight.shape[2:]
            return product.x, patch_sumsq(product.x, kernel, *product.convolution[:3]), conv_rows(y), bias
        z, own = product.x, 1
        if product.groups > 1:
            z, y, own = z.flatten(1), y.flatten(1), 2
        if isinstance(x, Tensor) and x.numel() == z.numel() and x.dim() > own:
            leading = x.shape[:-own]
            z, y = z.reshape(*leading, z.shape[-1]), y.reshape(*leading, y.shape[-1])
        return z, None, y, bias

    def _weight(self, module: nn.Module) -> Tensor:
        if self._matrix is None:
            return kernel_of(self._plain, module)
        return self._matrix(module)


class UnreadableAdapter(LayerAdapter):
    """A module with a forward from which no W can be read.

    Args:
        plain: Adapter of the module's kind.
    """

    def __init__(self, plain: LayerAdapter) -> None:
        self.kind = plain.kind
        self._plain = plain

    def check(self, module: nn.Module) -> None:
        raise Unsupported(NO_PRODUCT)

    def features(self, module: nn.Module) -> tuple[int, int]:
        return self._plain.features(module)

    def weight_rows(self, module: nn.Module) -> Tensor:
        raise Unsupported(NO_PRODUCT)  # after a discovery without values, in a streamed run


def kernel_of(plain: LayerAdapter, module: nn.Module) -> Tensor:
    """Return the weight of a module as `observe` takes it: [M, K], or the kernel of a convolution."""
    weight: Any = module.weight
    return weight.detach() if isinstance(plain, ConvAdapter) else plain.weight_rows(module).detach()


def returns_product(module: nn.Module, result: Any, product: Product) -> bool:
    """Return whether a forward returned its product, alone or first in a tuple, with the module's bias or without."""
    members = result if isinstance(result, (tuple, list)) else (result,)
    output = next((member for member in members if isinstance(member, Tensor)), None)
    if output is None or output.numel() != product.y.numel():
        return False
    y, bias = product.output()
    rows, expected = _features_last(output, product), _features_last(y, product)
    own: Any = getattr(module, "bias", None)
    with_bias = [expected + own] if bias is None and isinstance(own, Tensor) else []
    return any(close(rows, value) for value in (expected, *with_bias))


def close(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two results of one product are equal, up to the rounding of their type."""
    tolerance = _TOLERANCE[expected.dtype]
    if expected.device.type == "cuda":
        tolerance = max(tolerance, _TOLERANCE_TF32)
    actual, expected = actual.double().flatten(), expected.double().flatten()
    return bool((actual - expected).norm() <= tolerance * expected.norm())


def _features_last(y: Tensor, product: Product) -> Tensor:
    """Return an output as [rows, M]; that of a convolution may have its channels first or last."""
    out_features = product.weight.shape[: 2 if product.groups > 1 else 1].numel()
    if product.convolution is not None and y.shape[1] == out_features:
        y = y.movedim(1, -1)
    return y.reshape(-1, out_features)
