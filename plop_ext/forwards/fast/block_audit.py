"""The comparison of a block with and without the fused kernels on the same input: kernels, outputs and gains."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.collecting.collector import Collector
from plop_ext.forwards.batch import CACHES
from plop_ext.forwards.fast.binding import Bindings
from plop_ext.forwards.fast.blocks import FusedBlock
from plop_ext.forwards.fast.kernel_audit import Audit, row_errors
from plop_ext.totals import Totals


class BlockCheck:
    """The comparison of one block within one batch.

    The kernels are compared with the PyTorch kernels, row by row. The block is compared with the block without
    kernels, to verify that the kernels are composed as in this version of transformers. A wrong composition shows in
    most rows, so the limits of this comparison are loose.

    Args:
        fused: The block.
        collector: Collector of the run, which does not count the second run of the block.
        bindings: Suspended while the block runs without the kernels.

    Attributes:
        compared: Number of compared calls of the block.
        obstacle: The reason why a call was not compared.
    """

    def __init__(self, fused: FusedBlock, collector: Collector, bindings: Bindings) -> None:
        self.block = fused.block
        self.compared = 0
        self.obstacle: str | None = None
        self._fused = fused
        self._collector = collector
        self._bindings = bindings
        self._audit = Audit()
        inside = set(self.block.module.modules())
        self._rows = [row for row, layer in enumerate(collector.layers) if layer.module in inside]
        self._plain = Collector(self.block.module, [collector.layers[row] for row in self._rows])
        self._errors: list[tuple[float, Tensor]] = []

    @property
    def projected(self) -> bool:
        """Whether `gated_projection` was among the kernels compared."""
        return self._audit.has("gated_projection")

    def attach(self) -> None:
        """Start to compare each call of the block."""
        self._fused.audit = self._audit
        self._bindings.add(self.block.module, self._forward)

    def detach(self) -> None:
        self._fused.audit = None
        self._bindings.add(self.block.module, self._fused.forward)

    def disagreement(self, totals: Tensor) -> str | None:
        """Return the first disagreement, or None. Synchronizes.

        Args:
            totals: [layers of the run, samples, 5] of the batch.
        """
        name = type(self.block.module).__name__
        found = self._audit.disagreement()
        if found is not None:
            return found
        for limit, error in self._errors:
            if not float(error) <= limit:
                return f"the update of the residual by a {name} is off by {float(error):.1e}, more than {limit:.1e}"
        if self.obstacle is not None:  # the run counts calls that were not compared
            return None
        limit = self._errors[-1][0] / 5
        # One call after the other.
        plain = self._plain.recording.queue.all().unflatten(1, (-1, totals.shape[1])).sum(dim=1)
        ours, theirs = Totals(totals.numpy()).of_modules(self._rows), Totals(plain.numpy())
        called_elsewhere = ours.seen > theirs.seen
        for index, row in enumerate(self._rows):
            layer = self._collector.layers[row].name
            for sample in range(totals.shape[1]):
                place = index, sample
                if called_elsewhere[place]:
                    continue
                a, b = _counts(ours, place), _counts(theirs, place)
                if a != b:
                    return f"{layer} has {a} tokens counted, with zero input and not finite, instead of {b}"
                gain, expected = float(ours.sum_gain[place]), float(theirs.sum_gain[place])
                if not abs(gain - expected) <= limit * abs(expected):
                    return f"the gains of {layer} in a sample add up to {gain:.6g} and not {expected:.6g}"
        return None

    def _forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        fresh = _without_past(kwargs, self.block.module.self_attn.layer_idx)
        before = self._fused.fused
        output = self._fused.forward(hidden_states, *args, **kwargs)
        batch = self._collector.recording.batch
        if batch is None or self._fused.fused == before:
            return output
        if fresh is None:
            self.obstacle = self.obstacle or "its key-value cache holds earlier tokens"
            return output
        module = self.block.module
        try:
            with (
                self._collector.recording.set_aside(),
                self._bindings.suspended(),
                _without_hooks(module),
                self._plain,
            ):
                self._plain.recording.start(batch.tokens)
                reference = type(module).forward(module, hidden_states, *args, **fresh)
                self._plain.end()
        except Exception as error:
            self.obstacle = self.obstacle or f"it does not run once more ({type(error).__name__}: {error})"
            return output
        self.compared += 1
        # Half precision changes last bits of the residual, which may be much larger than the block's own output.
        limit = 5e-2 if output.dtype.itemsize == 2 else 1e-3
        errors = row_errors(*(x.flatten(0, -2) for x in (output, reference, reference - hidden_states)))
        self._errors.append((limit, errors.nan_to_num(nan=torch.inf).median()))
        return output


def _counts(totals: Totals, place: tuple[int, int]) -> list[float]:
    """Return the numbers of tokens of a module and sample that count, have a zero input, or are not finite."""
    fields = (totals.tokens, totals.skipped_zero, totals.skipped_nonfinite)
    return [float(field[place]) for field in fields]


def _without_past(kwargs: dict[str, Any], layer: int) -> dict[str, Any] | None:
    """Return the arguments without a key-value cache; None if the cache holds tokens, which the block needs."""
    for name in CACHES:
        cache = kwargs.get(name)
        if cache is not None and cache.get_seq_length(layer) > 0:
            return None
    return {name: None if name in CACHES else value for name, value in kwargs.items()}


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Disable the present hooks of `module` and its children within the block."""
    hooks = [(child, child._forward_hooks) for child in module.modules()]
    try:
        for child, _ in hooks:
            child._forward_hooks = OrderedDict()
        yield
    finally:
        for child, found in hooks:
            child._forward_hooks = found
