"""The matrix products that a forward computes, observed below its code.

A forward of its own may standardize, scale or fake-quantize the weight, pad or clip the input, work block by block, or
return more than the product. However it is written, the product itself is one call of `mm`, `bmm` or `convolution`,
whose operands are the W and the z of the score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """One product y = W z, of all rows z of an input.

    Attributes:
        x: Input: [T, K] or [B, T, K]; [T, G, K / G] of G blocks; [N, C, *size] of a convolution.
        weight: W [M, K]; [G, M / G, K / G] of G blocks; [M, C / groups, *kernel] of a convolution.
        y: Output with the bias: [T, M] or [B, T, M]; [T, G, M / G] of G blocks; [N, M, *size] of a convolution.
        bias: [M], or None.
        convolution: The remaining arguments of the convolution; None for a product of matrices.
        overwritten: Whether the forward has modified `y` in place since, as by adding a bias.
    """

    x: Tensor
    weight: Tensor
    y: Tensor
    bias: Tensor | None = None
    convolution: tuple[Any, ...] | None = None
    overwritten: bool = False

    @property
    def groups(self) -> int:
        """The number of blocks on the diagonal; 1 for an ordinary matrix."""
        return len(self.weight) if self.convolution is None and self.weight.dim() == 3 else 1

    def output(self) -> tuple[Tensor, Tensor | None]:
        """Return `y` and the bias that it includes; computed again, without a bias, if `y` was overwritten."""
        if not self.overwritten:
            return self.y, self.bias
        if self.convolution is not None:
            return _aten.convolution(self.x, self.weight, None, *self.convolution), None
        if self.groups > 1:
            return torch.einsum("tgk,gmk->tgm", self.x, self.weight), None
        return self.x @ self.weight.T, None


def observe(weight: Tensor, run: Callable[[], Any]) -> tuple[Any, Product | None]:
    """Run a forward; return its result, and its product with a matrix of the shape of `weight`, if it has one.

    Of several such products, the one with the unchanged weight counts.

    Args:
        weight: The module's weight, as [M, K], or as the kernel of a convolution.
        run: The forward.
    """
    with _Observer(weight) as observer:
        result = run()
    found = observer.found
    if len(found) != 1:
        found = [product for product in found if shares_memory(product.weight, weight)]
    return result, found[0] if len(found) == 1 else None


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are views of one storage, which on the meta device has no address."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class _Observer(TorchDispatchMode):
    """Keeps the products with a matrix of the shape of a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight
        self.found: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reader = _READERS.get(func)
        if reader is None:
            if torch.is_inference_mode_enabled():  # composite operators, such as `linear`, arrive whole
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            if func._schema.is_mutable:
                self._note_writes((*args, *kwargs.values()))
            return func(*args, **kwargs)
        y = func(*args, **kwargs)
        product = reader(self._weight.shape, y, *args, **kwargs)
        if product is not None:
            self.found.append(product)
        return y

    def _note_writes(self, args: tuple[Any, ...]) -> None:
        """Note the products that an operator in place may write to, of which some argument is a view."""
        tensors = [value for value in args if isinstance(value, Tensor)]
        for index, product in enumerate(self.found):
            if any(shares_memory(product.y, value) for value in tensors):
                self.found[index] = replace(product, overwritten=True)


def _dense(shape: torch.Size, y: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Product | None:
    """Read a product of two matrices: the second is W transposed; else the first is W, if it has its shape."""
    if matrix.T.shape == shape:
        return Product(x, matrix.T, y, bias)
    if x.shape == shape and bias is None:
        return Product(matrix.T, x, y.T)
    return None


def _dense_with_bias(
    shape: torch.Size, y: Tensor, bias: Tensor, x: Tensor, matrix: Tensor, *, beta: float = 1, alpha: float = 1
) -> Product | None:
    plain = beta == alpha == 1 and bias.shape == y.shape[1:]
    return _dense(shape, y, x, matrix, bias) if plain else None


def _batched(shape: torch.Size, y: Tensor, x: Tensor, matrices: Tensor) -> Product | None:
    """Read a batch of products: with one matrix for all, or with the blocks of a block-diagonal one."""
    blocks = matrices.transpose(1, 2)
    if matrices.stride(0) == 0 and blocks.shape[1:] == shape:
        return Product(x, blocks[0], y)
    if _stacked(blocks) == shape:
        return Product(x.transpose(0, 1), blocks, y.transpose(0, 1))
    if _stacked(x) == shape:
        return Product(matrices.permute(2, 0, 1), x, y.permute(2, 0, 1))
    return None


def _stacked(blocks: Tensor) -> tuple[int, int]:
    """Return the shape of blocks [G, M / G, K] one below the other."""
    return blocks.shape[0] * blocks.shape[1], blocks.shape[2]


def _convolved(
    shape: torch.Size, y: Tensor, x: Tensor, kernel: Tensor, bias: Tensor | None, *convolution: Any
) -> Product | None:
    if kernel.shape != shape:
        return None
    return Product(x, kernel, y, bias, convolution)


_READERS: dict[Any, Callable[..., Product | None]] = {
    _aten.mm.default: _dense,
    _aten.addmm.default: _dense_with_bias,
    _aten.bmm.default: _batched,
    _aten.convolution.default: _convolved,
}
