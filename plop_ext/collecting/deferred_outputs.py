"""Outputs of layers whose sums of squares are left to the fused kernel that reads them next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from plop_ext.collecting.rows import columns_of, output_sumsq
from plop_ext.layers import LinearLayer


class _Deferred(NamedTuple):
    out: Tensor
    rows: Tensor  # of the whole module
    version: int  # of `rows`
    bias: Tensor | None
    layer: LinearLayer


class DeferredOutputs:
    """The outputs that wait for a kernel, with the tensors for their sums.

    A kernel receives a tensor, not a module: the kernel that rotates q has no information whether q is the output of
    q_proj or a part of the output of qkv_proj. Therefore an output is found by the address of its first element, which
    is also the address of every view that starts with this element. Three rules make this safe:

    - The entry keeps the whole output alive, so that no other tensor can be allocated at the same address.
    - The number of elements must be that of the layer's columns. This distinguishes q from [q | k | v], which begins
      at the same address.
    - The version of the output must not have changed since the output was deferred. If code has modified the output in
      place, the sums would be wrong, so `take` raises an error.

    `flush` reads the outputs that no kernel has taken.
    """

    def __init__(self) -> None:
        self._by_address: dict[int, _Deferred] = {}

    def __len__(self) -> int:
        return len(self._by_address)

    def add(self, out: Tensor, rows: Tensor, bias: Tensor | None, layer: LinearLayer) -> None:
        """Add an output that waits for a kernel.

        Args:
            out: Tensor for its sums.
            rows: The module's output [.., M], contiguous.
            bias: [M] or None.
            layer: The layer, whose columns of `rows` are summed.
        """
        version = 0 if rows.is_inference() else rows._version
        self._by_address[columns_of(rows, layer).data_ptr()] = _Deferred(out, rows, version, bias, layer)

    def take(self, y: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return the tensor for the sums of `y` and the bias to subtract first; None if `y` was not deferred.

        Raises:
            RuntimeError: If the output was modified in place since it was deferred.
        """
        found = self._by_address.get(y.data_ptr())
        if found is None or columns_of(found.rows, found.layer).shape.numel() != y.numel():
            return None
        del self._by_address[y.data_ptr()]
        _check_unmodified(found)
        bias, layer = found.bias, found.layer
        if bias is not None and layer.split is not None:
            bias = layer.split.select(bias, layer.part).flatten()
        return found.out, bias

    def flush(self, step: int, phase: int) -> None:
        """Read every `step`-th row of the outputs that still wait, and release them."""
        while self._by_address:
            _, found = self._by_address.popitem()
            _check_unmodified(found)
            output_sumsq(found.out, found.rows, found.bias, found.layer, step, phase)

    def clear(self) -> None:
        self._by_address.clear()


def _check_unmodified(found: _Deferred) -> None:
    if found.rows._version != found.version:
        raise RuntimeError(
            f"the output of `{found.layer.name}` was modified in place before it was read; score without `fast`"
        )
