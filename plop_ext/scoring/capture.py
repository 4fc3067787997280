"""Captures work on a CUDA device as a graph, finds out beforehand if it could be, and cleans up where it could not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Kept for good: the allocator of pinned memory may go on asking a graph whose capture did not end.
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
        """Capture `work`, which computes nothing yet.

        Args:
            work: Enqueues kernels on the current stream and returns the tensor they write.

        Returns:
            What enqueues them again on the current stream, and that tensor. It stays valid until `release`, but the
            next replay of any graph of this recorder may follow only on the same stream.

        Raises:
            Exception: Whatever `work` or the capture raises. Streams, allocator and random generator are as before.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self._device)
        try:
            # The outer context, because `torch.cuda.graph` leaves its own stream current when a capture fails.
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
        """Give the graphs and their memory back, once the device has done with them."""
        if not self._graphs:
            return
        torch.cuda.synchronize(self._device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = None

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what a capture that did not end leaves behind.

        The caching allocator still takes it for running, so that `empty_cache` fails from then on, and so may the
        random generator, so that the next dropout fails. The first is told; a capture that ends tells the second.
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


@contextmanager
def noting_waits(device: torch.device) -> Iterator[list[str]]:
    """Note where in the block the host waits for `device`, as `file.py:line`; the list is filled at its end.

    torch says so in warnings. Other ones of the block are passed on afterwards.
    """
    waits: list[str] = []
    if device.type != "cuda":
        yield waits
        return
    mode = torch.cuda.get_sync_debug_mode()
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode(mode)
    finally:
        for item in caught:
            text = str(item.message)
            if _WAIT in text:
                waits.append(f"{Path(item.filename).name}:{item.lineno}")
            elif _PROTOTYPE not in text:
                warnings.warn_explicit(item.message, item.category, item.filename, item.lineno, source=item.source)


def cause(error: BaseException) -> str:
    """The first line of what went wrong first: the end of a failed capture raises an error of its own on top."""
    while error.__context__ is not None:
        error = error.__context__
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device for good: cuBLAS keeps a workspace for every stream that it ever ran on."""
    return torch.cuda.Stream(device)
