"""Runs blocks by the fused kernels and as they were, on the same input, and compares outputs and gains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plop_ext.fast.binding import Bindings
from plop_ext.fast.forwards import FusedBlock
from plop_ext.scoring.collector import Collector

# Names of the key-value cache among the arguments of a block, by version of transformers.
_CACHES = ("cache", "past_key_values")


class BlockCheck:
    """The comparison of one block within one batch.

    Args:
        fused: The block.
        collector: Of the run; it does not count what the block does once more.
        bindings: Suspended while the block runs as it was.
    """

    def __init__(self, fused: FusedBlock, collector: Collector, bindings: Bindings) -> None:
        self.block = fused.block
        self._fused = fused
        self._collector = collector
        self._bindings = bindings
        inside = set(self.block.module.modules())
        self.rows = [row for row, layer in enumerate(collector.layers) if layer.module in inside]
        self._plain = Collector(self.block.module, [collector.layers[row] for row in self.rows])
        self._errors: list[Tensor] = []
        self._dtype = torch.float32

    def attach(self) -> None:
        """Compare at each call of the block from now on."""
        self._bindings.add(self.block.module, self._forward)

    def detach(self) -> None:
        self._bindings.add(self.block.module, self._fused.forward)

    def disagreement(self, totals: Tensor) -> str | None:
        """What disagrees, or None. Waits for the device.

        Args:
            totals: [layers of the run, samples, 5] of the batch.
        """
        name = type(self.block.module).__name__
        if not self._errors:
            return f"a {name} was not called"
        # One unit in the last place: a kernel that computes something else is off by more, one that only rounds
        # differently, in a few elements, by less.
        limit = max(torch.finfo(self._dtype).eps, 1e-5)
        error = float(torch.stack(self._errors).max())
        if not error <= limit:
            return f"the output of a {name} is off by {error:.1e}, more than {limit:.1e}"
        ours, plain = totals[self.rows].sum(dim=1), self._plain.totals().sum(dim=1)
        names = [self._collector.layers[row].name for row in self.rows]
        for layer, a, b in zip(names, ours.tolist(), plain.tolist(), strict=True):
            if a[2:] != b[2:]:
                return f"{layer} counts {a[2:]} and not {b[2:]} tokens, zero inputs and non-finite ones"
            if not abs(a[0] - b[0]) <= limit * abs(b[0]):
                return f"the mean gain of {layer} is off by {abs(a[0] / b[0] - 1):.1e}, more than {limit:.1e}"
        return None

    def _forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self._fused.forward(hidden_states, *args, **kwargs)
        tokens = self._collector.tokens
        if tokens is None:
            return output
        module = self.block.module
        with self._collector.paused(), self._bindings.suspended(), self._plain:
            self._plain.begin_with(tokens)
            # Without the cache that has these tokens already; one that held others before makes the check fail.
            kwargs = {name: None if name in _CACHES else value for name, value in kwargs.items()}
            reference = type(module).forward(module, hidden_states, *args, **kwargs)
            self._plain.end()
        self._dtype = output.dtype
        # Rows of padding may hold the same infinities or NaN in both.
        same = (output == reference) | (output.isnan() & reference.isnan())
        difference = torch.where(same, 0.0, output - reference)
        scale = torch.linalg.vector_norm(reference.nan_to_num(0.0, 0.0, 0.0), dtype=torch.float32)
        self._errors.append(torch.linalg.vector_norm(difference, dtype=torch.float32) / scale)
        return output


def disagreement(checks: Sequence[BlockCheck], collector: Collector) -> str | None:
    """The first thing that disagrees in the batch closed last, or None. Waits for the device."""
    totals = collector.last_totals()
    return next((found for check in checks if (found := check.disagreement(totals)) is not None), None)
