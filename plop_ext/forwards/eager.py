"""Eager forwards, one batch after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from plop_ext.collecting.collector import Collector
from plop_ext.forwards.batch import batch_to_device, input_device
from plop_ext.forwards.masks.decide import UnknownMasks, decided_masks, without_all_ones_masks
from plop_ext.streams.batch import BatchStreams


class EagerForwards:
    """Context manager that runs scoring forwards eagerly.

    Args:
        model: Prepared for scoring.
        forward: Function that runs a batch.
        collector: Entered before the first batch.
        decides_masks: Keep a transformers model from reading the values of masks and positions, which would
            synchronize in every forward and leave the device idle. Attention by flash-attn or flex reads them in any
            case. Only if `forward` is `default_forward` and `may_omit_masks` is true.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module, Any], Any],
        collector: Collector,
        *,
        decides_masks: bool = False,
    ) -> None:
        self._model = model
        self._forward = forward
        self._collector = collector
        self._decides_masks = decides_masks
        self._device = input_device(model)

    def __enter__(self) -> EagerForwards:
        return self

    def __exit__(self, *unused: object) -> None:
        pass

    def run(self, batch: Any, streams: BatchStreams, *, step: int = 1, phase: int = 0) -> None:
        """Score a batch; see `Forwards.run`."""
        with ExitStack() as stack:
            if self._decides_masks:
                inputs = without_all_ones_masks(batch)
                try:
                    stack.enter_context(decided_masks(inputs, plain=True))
                    batch = inputs
                except UnknownMasks:  # then transformers reads the values
                    self._decides_masks = False
            inputs = batch_to_device(batch, self._device)
            self._collector.announce(streams, step=step, phase=phase)
            self._forward(self._model, inputs)
            self._collector.end()

    def forget(self) -> None:
        """Do nothing, because nothing is kept of a batch."""

    def report(self) -> dict[str, Any]:
        """Return the entries `fast` and `graph` of the provenance, both None."""
        return {"fast": None, "graph": None}
