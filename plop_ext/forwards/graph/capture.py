"""The capture of CUDA graphs: detection of synchronizations before a capture, and cleanup after a failed one."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from torch import Tensor

# Never freed: the allocator of pinned memory may query a graph whose capture failed.
_FAILED: list[torch.cuda.CUDAGraph] = []
_WAIT = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode is a prototype"


class Recorder:
    """Graphs of one device, in one memory pool.

    Args:
        device: The CUDA device.

    Attributes:
        captured: Graphs captured so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.captured = 0
        self._device = device
        self._pool: Any = None
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture `work` without running it.

        Args:
            work: Function that enqueues kernels on the current stream and returns the tensor that they write.

        Returns:
            A function that enqueues the kernels again on the current stream, and the tensor. The tensor stays valid
            until `release`; the next replay of any graph of this recorder has to be on the same stream.

        Raises:
            Exception: The exception of `work` or of the capture, after streams, allocator and random generator were
                restored.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self._device)
        try:
            # The outer context restores the stream: `torch.cuda.graph` leaves its own stream current on failure.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=_side_stream(self._device), capture_error_mode="thread_local"
                ),
            ):
                result = work()
        except BaseException:
            self._recover(graph)
            raise
        self._graphs.append(graph)
        self.captured += 1
        return graph.replay, result

    def release(self) -> None:
        """Release the graphs and their memory, after synchronization."""
        if not self._graphs:
            return
        torch.cuda.synchronize(self._device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = None

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Restore allocator and random generator after a failed capture.

        The caching allocator considers the capture as running, so `empty_cache` would fail from then on; ending the
        allocation resets it. The random generator may do so too, and the next dropout would fail; a trivial capture
        that succeeds resets it.
        """
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)
        with suppress(RuntimeError):
            graph.reset()
        _FAILED.append(graph)
        with suppress(RuntimeError), torch.cuda.stream(_side_stream(self._device)):
            trivial = torch.cuda.CUDAGraph()
            trivial.capture_begin(capture_error_mode="thread_local")
            torch.zeros(1, device=self._device)
            trivial.capture_end()
            trivial.reset()


class _Waits:
    """Records the synchronizations of each thread with a device.

    torch reports them as warnings in a mode of the whole process, which is on while at least one thread records. A
    synchronization is recorded for its thread. Those of other threads are dropped, unless the mode was on before. All
    other warnings are shown as usual. `warnings.catch_warnings` is not safe for overlapping threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listening = 0
        self._mode = 0
        self._show = warnings.showwarning
        self._changed: list[Any] = []
        self._filters: list[Any] = []
        self._own = threading.local()

    @contextmanager
    def noted(self) -> Iterator[list[str]]:
        with self._lock:
            if self._listening == 0:
                self._begin()
            self._listening += 1
        outer = getattr(self._own, "waits", None)
        waits: list[str] = []
        self._own.waits = waits
        try:
            yield waits
        finally:
            self._own.waits = outer
            with self._lock:
                self._listening -= 1
                if self._listening == 0:
                    self._end()

    def _begin(self) -> None:
        self._mode = torch.cuda.get_sync_debug_mode()
        if warnings.showwarning != self._note:  # another thread's `catch_warnings` may have restored it
            self._show = warnings.showwarning
        warnings.showwarning = self._note
        warnings.filterwarnings("ignore", message=f".*{_PROTOTYPE}")
        warnings.filterwarnings("always", message=f".*{_WAIT}")
        self._changed, self._filters = cast(list[Any], warnings.filters), list(warnings.filters[:2])
        torch.cuda.set_sync_debug_mode("warn")

    def _end(self) -> None:
        torch.cuda.set_sync_debug_mode(self._mode)
        if warnings.showwarning == self._note:
            warnings.showwarning = self._show
        # In another thread's `catch_warnings`, `warnings.filters` is a copy; on exit it restores the changed list.
        for filters in (self._changed, cast(list[Any], warnings.filters)):
            for item in self._filters:
                with suppress(ValueError):
                    filters.remove(item)

    def _note(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        is_wait = _WAIT in str(message)
        waits = getattr(self._own, "waits", None)
        if is_wait and waits is not None:
            waits.append(f"{Path(filename).name}:{lineno}")
        if not is_wait or self._mode != 0:
            self._show(message, category, filename, lineno, file, line)


_WAITS = _Waits()


@contextmanager
def noting_waits(device: torch.device) -> Iterator[list[str]]:
    """Record where in the block this thread synchronizes with `device`, as `file.py:line`."""
    if device.type != "cuda":
        yield []
        return
    with _WAITS.noted() as waits:
        yield waits


def cause(error: BaseException) -> str:
    """Return the first line of the original error: the end of a failed capture raises a second one."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream that is kept per device, because cuBLAS keeps a workspace for every stream that it has used."""
    return torch.cuda.Stream(device)
