"""Forwards as they come, one batch after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from plop_ext.collecting.collector import Collector
from plop_ext.forwards.batch import batch_to_device, input_device
from plop_ext.forwards.masks.decide import UnknownMasks, decided_masks, without_all_ones_masks


class EagerForwards:
    """Context manager that runs scoring forwards as they come.

    Args:
        model: Prepared for scoring.
        forward: Runs a batch.
        collector: Entered before the first batch.
        decides_masks: Keep a transformers model from looking at the values of masks and positions, for which the host
            would wait in every forward, with the device idle until it has caught up; attention by flash-attn or flex
            looks nevertheless. Only where `forward` is `default_forward` and `may_omit_masks` says yes.
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

    def run(self, batch: Any, size: int, counted: Tensor | None, *, step: int = 1, phase: int = 0) -> None:
        """Score a batch; see `Forwards.run`."""
        with ExitStack() as stack:
            if self._decides_masks:
                inputs = without_all_ones_masks(batch)
                try:
                    stack.enter_context(decided_masks(inputs, plain=True))
                    batch = inputs
                except UnknownMasks:  # then it looks
                    self._decides_masks = False
            inputs = batch_to_device(batch, self._device)
            self._collector.begin(size, counted, step=step, phase=phase)
            self._forward(self._model, inputs)
            self._collector.end()

    def forget(self) -> None:
        """Do nothing: nothing is kept of a batch."""

    def report(self) -> dict[str, Any]:
        """Return the entries of the provenance, none of which was asked for."""
        return {"fast": None, "graph": None}
