"""Linear layers whose weight cannot be read: W is computed by applying the forward to the identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.layers.adapter import LayerAdapter, Unsupported, register_adapter
from plop_ext.layers.attributes import attribute
from plop_ext.layers.linear import is_plain_linear
from plop_ext.layers.sharded import why_not_readable

# Largest relative difference between W (a + b) and W a + W b: quantized activations cause a few percent, a forward
# that is not linear causes more.
LINEAR_TOLERANCE = 0.1
_IDENTITY_ROWS = 256


@register_adapter
class OpaqueAdapter(LayerAdapter):
    """A linear layer whose weight cannot be read: GPTQ, AWQ, Marlin and other packed formats.

    W is computed by applying the forward to the identity, which also works if only a fused kernel can read the format.
    The computation costs one forward of K tokens per module, once per run.
    """

    kind = "unreadable weight"
    weights = "identity"
    priority = -100  # the fallback, which matches every module with sizes

    def matches(self, module: nn.Module) -> bool:
        sizes = (attribute(module, "in_features"), attribute(module, "out_features"))
        known = all(isinstance(size, int) for size in sizes) and not list(module.children())
        return known and not is_plain_linear(module)

    def check(self, module: nn.Module) -> None:
        reason = why_not_readable(module)
        if reason:
            raise Unsupported(reason)
        if min(self.features(module)) < 1:
            raise Unsupported("its sizes are set by its first forward; run one forward first")

    def features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.in_features, layer.out_features

    def weight_sumsq(self, module: nn.Module) -> Tensor:
        sums = [columns.square().sum(dim=0, dtype=torch.float64) for columns in self._column_chunks(module)]
        return torch.stack(sums).sum(dim=0)

    def weight_chunks(self, module: nn.Module) -> Iterable[Tensor]:
        """Yield W at once, as only the forward gives it: needed for narrow weights."""
        yield torch.cat(list(self._column_chunks(module))).T

    def _column_chunks(self, module: nn.Module) -> Iterator[Tensor]:
        """Yield the columns of W in order, as chunks [*, M]."""
        in_features = self.features(module)[0]
        device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        dtype = self.dtype(module)
        with torch.no_grad():
            zero = self.probe(module, torch.zeros(1, in_features, dtype=dtype, device=device)).float()
            self._check_linear(module, zero, device)
            for start in range(0, in_features, _IDENTITY_ROWS):
                stop = min(start + _IDENTITY_ROWS, in_features)
                rows = torch.zeros(stop - start, in_features, dtype=dtype, device=device)
                rows[torch.arange(stop - start), torch.arange(start, stop)] = 1
                yield self.probe(module, rows).float() - zero

    def _check_linear(self, module: nn.Module, zero: Tensor, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, 1, self.features(module)[0], generator=generator).to(device, self.dtype(module))
        w_a, w_b, w_sum = (self.probe(module, z).float() - zero for z in (a, b, a + b))
        if not (w_sum - w_a - w_b).norm() <= LINEAR_TOLERANCE * w_sum.norm():
            raise Unsupported("its forward is not linear")
        together = self.probe(module, torch.cat((a, b))).float() - zero
        if not (together - torch.cat((w_a, w_b))).norm() <= LINEAR_TOLERANCE * together.norm():
            raise Unsupported("its forward mixes the rows of its input")
