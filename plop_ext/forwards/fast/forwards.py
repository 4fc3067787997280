"""Forwards on fused kernels, on top of eager or graphed forwards."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

from torch import nn

from plop_ext.collecting.collector import Collector
from plop_ext.forwards.batch import brings_cache
from plop_ext.forwards.fast.path import FastPath
from plop_ext.forwards.protocol import Forwards
from plop_ext.streams.batch import BatchStreams


class FastForwards:
    """Context manager that runs scoring forwards with the blocks of supported families on fused kernels.

    The kernels are checked on the first batch without a key-value cache. Earlier batches run without the kernels,
    because a forward fills the cache, and the batch could not be scored again if the kernels disagreed.

    Args:
        model: Prepared for scoring.
        collector: Entered before this and left after it.
        inner: Forwards that run the batches.
    """

    def __init__(self, model: nn.Module, collector: Collector, inner: Forwards) -> None:
        self._path = FastPath(model, collector)
        self._inner = inner
        self._stack = ExitStack()

    def __enter__(self) -> FastForwards:
        with ExitStack() as stack:
            stack.enter_context(self._path)
            stack.enter_context(self._inner)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, batch: Any, streams: BatchStreams, *, step: int = 1, phase: int = 0) -> None:
        """Score a batch; see `Forwards.run`."""
        run = partial(self._inner.run, batch, streams, step=step, phase=phase)
        if self._path.due and not brings_cache(batch):
            self.forget()
            if not self._path.check(run):
                self.forget()
                run()
        elif self._path.checked:
            run()
        else:
            with self._path.suspended():
                run()

    def forget(self) -> None:
        """Drop everything that `inner` kept of earlier batches."""
        self._inner.forget()

    def report(self) -> dict[str, Any]:
        """Return the report of `inner`, with the entry `fast`."""
        return {**self._inner.report(), "fast": self._path.report()}
