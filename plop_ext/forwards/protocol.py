"""The interface of every way to run a scoring forward."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

from plop_ext.streams.batch import BatchStreams


class Forwards(Protocol):
    """Context manager that runs scoring forwards: eagerly, as CUDA graphs or by fused kernels (`choose_forwards`)."""

    def __enter__(self) -> Forwards: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, batch: Any, streams: BatchStreams, *, step: int = 1, phase: int = 0) -> None:
        """Score a batch: `begin` of the collector, the forward, and `end` of the collector.

        Args:
            batch: On the host or the device. If forwards are graphed, reading a mask on the device synchronizes.
            streams: Its rows.
            step: Read every `step`-th row only.
            phase: The first row read, in [0, step).
        """

    def forget(self) -> None:
        """Drop everything kept of earlier batches, because the model runs other code from now on."""

    def report(self) -> dict[str, Any]:
        """Return the entries `fast` and `graph` of the provenance; None for a way that is not in use.

        Call it before the context is left.
        """
