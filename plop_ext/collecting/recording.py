"""What the hooks of a collector record to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from plop_ext.collecting.notes import Notes
from plop_ext.collecting.running_batch import Arenas, RunningBatch
from plop_ext.collecting.token_map import BatchTokens
from plop_ext.collecting.totals_queue import TotalsQueue
from plop_ext.layers import LinearLayer

# The backward that this thread is in: gradient checkpointing repeats forwards there.
_current_backward = torch._C._current_graph_task_id
_NO_BACKWARD = -1


@dataclass
class _Level:
    """A batch, where one runs, and the buffers that it and those after it reduce in."""

    arenas: Arenas = field(default_factory=dict)
    batch: RunningBatch | None = None


class Recording:
    """The batch that runs, and the totals of those that are closed.

    Args:
        layers: What is scored; the parts of one module are neighbours.
        last_call_only: Keep only the last call of a layer in a batch.

    Attributes:
        layers: As given.
        last_call_only: As given.
        layers_of: What is scored of each module, with the rows of the totals.
        notes: What the batches showed beside their totals.
        queue: The totals of closed batches.
    """

    def __init__(self, layers: Sequence[LinearLayer], last_call_only: bool) -> None:
        self.layers = tuple(layers)
        self.last_call_only = last_call_only
        self.layers_of: dict[nn.Module, list[tuple[int, LinearLayer]]] = {}
        for index, layer in enumerate(self.layers):
            self.layers_of.setdefault(layer.module, []).append((index, layer))
        self.notes = Notes()
        self.queue = TotalsQueue(len(self.layers))
        self._levels = [_Level()]

    @property
    def batch(self) -> RunningBatch | None:
        """The running batch; None where a forward does not count: nobody announced it, or it is a recomputation."""
        batch = self._levels[-1].batch
        return batch if batch is None or _current_backward() == _NO_BACKWARD else None

    def start(self, tokens: BatchTokens) -> None:
        """Announce the next forward, in the place of one that did not end."""
        level = self._levels[-1]
        level.batch = RunningBatch(tokens, level.arenas, len(self.layers), self.notes, self.last_call_only)

    def close(self) -> Tensor:
        """Return the totals [M, B, 5] float64 of the forward announced last, on its device, for the queue."""
        level = self._levels[-1]
        assert level.batch is not None, "begin() comes first"
        totals = level.batch.finish()
        level.batch = None
        return totals

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the block no batch runs but one that the block starts, in buffers of its own; the outer one waits."""
        self._levels.append(_Level())
        try:
            yield
        finally:
            self._levels.pop()

    def clear(self) -> None:
        """Give the buffers back."""
        self._levels = [_Level()]
