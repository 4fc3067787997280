"""Several processes of one gloo group, forked from the test: they share what it built, and start at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed

# A collective that waits this long has hung; a test that runs this long fails.
GROUP_SECONDS = 40
TEST_SECONDS = 60
# A fork of a process with threads may stop before its first line of Python, at a lock that a thread held. It has then
# run nothing of what is tested, so the processes are started anew; a hang after they have met is never tried again.
START_SECONDS = 15
STARTS = 4


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        value: What its work returned.
        error: What it raised, as `NameOfTheClass: text`; empty if it raised nothing.
        trace: The traceback.
        killed: Name of the signal that ended it; `exit` if it left by itself, and empty if it ended well.
        seconds: Time that its work took.
    """

    value: Any = None
    error: str = ""
    trace: str = ""
    killed: str = ""
    seconds: float = 0.0


def in_processes(count: int, work: Callable[..., Any], *args: Any, seconds: float = TEST_SECONDS) -> list[Any]:
    """The results of `work(*args)` in `count` processes, by rank; fails if one raises, ends or takes too long.

    Args:
        count: Number of processes.
        work: Called in each process, in which the default process group is ready.
        *args: Its arguments, which the fork copies.
        seconds: Limit of the whole call.
    """
    ends = ends_of(count, work, *args, seconds=seconds)
    failed = [f"rank {rank}: {end.trace or end.killed}" for rank, end in enumerate(ends) if end.error or end.killed]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)
    return [end.value for end in ends]


def ends_of(count: int, work: Callable[..., Any], *args: Any, seconds: float = TEST_SECONDS) -> list[End]:
    """How `count` processes that call `work(*args)` end, by rank; fails if one takes too long. See `in_processes`."""
    for _ in range(STARTS):
        ends = _started(count, work, args, seconds)
        if ends is not None:
            break
    else:
        pytest.fail(f"{count} processes did not meet within {START_SECONDS} s, {STARTS} times", pytrace=False)
    hanging = [rank for rank, end in enumerate(ends) if end is None]
    if hanging:
        pytest.fail(f"ranks {hanging} hang; how the others ended: {ends}", pytrace=False)
    return [end for end in ends if end is not None]


def _started(count: int, work: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> list[End | None] | None:
    """How the processes end, None for one that takes too long; None for all if they do not meet."""
    context: Any = multiprocessing.get_context("fork")
    # As under torchrun, the store outlives every rank.
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_run, args=(rank, count, store.port, sender, work, args), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    try:
        meeting = time.monotonic() + START_SECONDS
        if not all(receiver.poll(max(0.0, meeting - time.monotonic())) for receiver, _ in pipes):
            return None
        if any(receiver.recv() is not None for receiver, _ in pipes):  # the error of a group that was not made
            return None
        deadline = time.monotonic() + seconds
        return [_receive(receiver, process, deadline) for process, (receiver, _) in zip(processes, pipes, strict=True)]
    finally:
        for process in processes:
            process.join(1)
            if process.is_alive():
                process.kill()


def _receive(receiver: Any, process: Any, deadline: float) -> End | None:
    if not receiver.poll(max(0.0, deadline - time.monotonic())):
        return None
    try:
        end: End = receiver.recv()
        return end
    except EOFError:
        process.join()
        return End(killed=signal.Signals(-process.exitcode).name if process.exitcode < 0 else "exit")


def _run(rank: int, count: int, port: int, sender: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # Variables that transformers and accelerate read.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    started = time.monotonic()
    try:
        distributed.init_process_group(
            "gloo",
            store=distributed.TCPStore("127.0.0.1", port, is_master=False),
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=GROUP_SECONDS),
        )
        distributed.barrier()
        sender.send(None)
        torch.manual_seed(0)
        started = time.monotonic()
        end = End(work(*args), seconds=time.monotonic() - started)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        end = End(error=text, trace=traceback.format_exc(), seconds=time.monotonic() - started)
    try:
        sender.send(end)
        sender.close()
    finally:
        os._exit(0)  # no atexit handlers of the test process, and no wait for the others
