"""Several processes of one gloo group, forked from the test: they share what it built, and start at once."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed

# A collective that waits this long has hung; a test that runs this long fails.
GROUP_SECONDS = 20
TEST_SECONDS = 60


def in_processes(count: int, work: Callable[..., Any], *args: Any, seconds: float = TEST_SECONDS) -> list[Any]:
    """The results of `work(*args)` in `count` processes, by rank; fails if one raises, ends or takes too long.

    Args:
        count: Number of processes.
        work: Called in each process, in which the default process group is ready.
        *args: Its arguments, which the fork copies.
        seconds: Limit of the whole call.
    """
    context: Any = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(count)]
        store = os.path.join(folder, "store")
        processes = [
            context.Process(target=_run, args=(rank, count, store, sender, work, args), daemon=True)
            for rank, (_, sender) in enumerate(ends)
        ]
        for process in processes:
            process.start()
        for _, sender in ends:
            sender.close()
        deadline = time.monotonic() + seconds
        try:
            results = [_receive(receiver, rank, deadline) for rank, (receiver, _) in enumerate(ends)]
        finally:
            for process in processes:
                process.join(1)
                if process.is_alive():
                    process.kill()
    failed = [text for ok, text in results if not ok]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)
    return [value for _, value in results]


def _receive(receiver: Any, rank: int, deadline: float) -> tuple[bool, Any]:
    if not receiver.poll(max(0.0, deadline - time.monotonic())):
        return False, f"rank {rank} hangs"
    try:
        return receiver.recv()
    except EOFError:
        return False, f"rank {rank} ended without a result"


def _run(rank: int, count: int, store: str, sender: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # Variables that transformers and accelerate read.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=GROUP_SECONDS),
        )
        torch.manual_seed(0)
        sender.send((True, work(*args)))
    except BaseException:
        sender.send((False, f"rank {rank}: {traceback.format_exc()}"))
    finally:
        sender.close()
        os._exit(0)  # no atexit handlers of the test process, and no wait for the others
