"""Runs a function in several processes of a gloo group, within a limit, so that a hang fails.

The processes fork from a server that has imported everything once: a rank starts in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

_PRELOADED = [
    "pytest",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "transformers.models.qwen2.modeling_qwen2",
    "plop_ext.scoring.lockstep",
    "plop_ext.scoring.score",
    "tests.support.tiny_models",
]


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes:
        value: What its function returned.
        error: `NameOfTheClass: text` of the exception that it raised; empty if it raised none.
        signal: Name of the signal that killed it; empty if none did.
        seconds: Time that the function took.
    """

    value: Any = None
    error: str = ""
    signal: str = ""
    seconds: float = 0.0


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, limit: float = 60.0, group_timeout: float = 20.0
) -> list[Ended]:
    """Call `function(rank, *args)` in `size` processes of a group, and return how each ended.

    Args:
        function: A function at the top of a module.
        size: Number of processes.
        *args: Further arguments, which can be pickled.
        limit: Seconds after which all are killed and the test fails.
        group_timeout: Timeout of the default group.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = time.monotonic()
    processes, pipes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run, args=(sender, function, rank, size, store.port, group_timeout, args), daemon=True
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        ended = [_received(pipe, process, started + limit) for pipe, process in zip(pipes, processes, strict=True)]
        hanging = [rank for rank, found in enumerate(ended) if found is None]
        assert not hanging, f"ranks {hanging} of {size} hang after {limit:g} s; the others: {ended}"
        return [found for found in ended if found is not None]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def values(function: Callable[..., Any], size: int, *args: Any, **limits: float) -> list[Any]:
    """Return what each rank returned; none may raise."""
    ended = run_ranks(function, size, *args, **limits)
    assert [found.error or found.signal for found in ended] == [""] * size
    return [found.value for found in ended]


def _run(
    pipe: Any, function: Callable[..., Any], rank: int, size: int, port: int, timeout: float, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)})
    store = distributed.TCPStore("127.0.0.1", port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    distributed.barrier()
    torch.manual_seed(0)
    started = time.monotonic()
    try:
        found = Ended(function(rank, *args), seconds=time.monotonic() - started)
    except Exception as error:
        found = Ended(error=f"{type(error).__name__}: {error}", seconds=time.monotonic() - started)
    pipe.send(found)
    pipe.close()
    os._exit(0)


def _received(pipe: Any, process: Any, deadline: float) -> Ended | None:
    """Return how a rank ended, or None if it has not by the deadline."""
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        return None
    try:
        found: Ended = pipe.recv()
        return found
    except EOFError:
        process.join()
        return Ended(signal=signal.Signals(-process.exitcode).name if process.exitcode < 0 else "exit")
