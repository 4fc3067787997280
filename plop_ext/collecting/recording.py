"""The record to which the hooks of a collector write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.collecting.feeding import Feeding
from plop_ext.collecting.notes import Notes
from plop_ext.collecting.running_batch import Arenas, RunningBatch
from plop_ext.collecting.token_map import BatchTokens
from plop_ext.collecting.totals_queue import TotalsQueue
from plop_ext.layers import LinearLayer

# The id of this thread's running backward, in which gradient checkpointing repeats forwards.
_current_backward = torch._C._current_graph_task_id
_NO_BACKWARD = -1


@dataclass
class _Level:
    """The running batch, if any, and the buffers for this batch and for later ones."""

    arenas: Arenas = field(default_factory=dict)
    batch: RunningBatch | None = None


class Recording:
    """The running batch, and the totals of closed batches.

    Args:
        layers: The scored layers; the parts of one module are neighbours.
        last_call_only: Keep only the last call of a layer in a batch.
        stages: Group of the stages of a pipeline, each of which calls some of the layers; None for a whole model.
        communicating: What other processes exchange with this one in a forward of the model; empty if nothing.

    Attributes:
        layers: The layers, as given.
        last_call_only: As given.
        communicating: As given.
        layers_of: The scored layers of each module, with their rows in the totals.
        notes: Observations in addition to the totals.
        feeding: The states of other streams that the running modules have received.
        queue: The totals of closed batches.
    """

    def __init__(
        self, layers: Sequence[LinearLayer], last_call_only: bool, stages: Any = None, communicating: str = ""
    ) -> None:
        self.layers = tuple(layers)
        self.last_call_only = last_call_only
        self.communicating = communicating
        self.layers_of: dict[nn.Module, list[tuple[int, LinearLayer]]] = {}
        for index, layer in enumerate(self.layers):
            self.layers_of.setdefault(layer.module, []).append((index, layer))
        self.notes = Notes()
        self.feeding = Feeding()
        self.queue = TotalsQueue(len(self.layers))
        self._stages = stages
        self._levels = [_Level()]

    @property
    def batch(self) -> RunningBatch | None:
        """The running batch; None if a forward does not count, because it is unannounced or a recomputation."""
        batch = self._levels[-1].batch
        return batch if batch is None or _current_backward() == _NO_BACKWARD else None

    def start(self, tokens: BatchTokens) -> None:
        """Announce the next forward, and discard one that did not end."""
        level = self._levels[-1]
        level.batch = RunningBatch(tokens, level.arenas, len(self.layers), self.notes, self.last_call_only)

    def close(self) -> Tensor:
        """Return the totals [M, B, 5] float64 of the announced forward, on its device, for the queue."""
        level = self._levels[-1]
        assert level.batch is not None, "begin() comes first"
        totals = level.batch.finish()
        level.batch = None
        if self._stages is not None:
            torch.distributed.all_reduce(totals, group=self._stages)  # of zeros, but for this stage's layers
        return totals

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Suspend the running batch within the block, which may run other batches in separate buffers."""
        self._levels.append(_Level())
        try:
            yield
        finally:
            self._levels.pop()

    def clear(self) -> None:
        """Release the buffers."""
        self._levels = [_Level()]
