"""The processes of a command: one, or those of torchrun and accelerate launch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any


class Launch:
    """One process, which does everything.

    Attributes:
        first: Whether this process reads and writes files, prints and warns for all.
        size: Number of processes.
        device: The device of this process; None is that of the command line.
        idle: Whether this process has nothing to do, because the command runs in one.
    """

    first = True
    size = 1
    device: str | None = None
    idle = False

    def on_first(self, call: Callable[[], Any]) -> Any:
        """Return what `call` returns in the first process, as plain JSON; what it raises is raised in all."""
        return call()

    def wait(self) -> None:
        """Wait until every process has come here."""

    def tells(self, error: BaseException) -> bool:
        """Return whether this process prints an error that ends the command, and not another one."""
        return True

    def told(self, error: BaseException) -> None:
        """Say that this process has printed the error."""


class Idle(Launch):
    """A process of a command that runs in one, without need."""

    first = False
    idle = True

    def tells(self, error: BaseException) -> bool:
        return False


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as the launcher set them."""
    found = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    rank, size = (int(text) if text.isdecimal() else -1 for text in found)
    return (rank, size) if 0 <= rank < size else (0, 1)


@contextmanager
def only_first_prints() -> Iterator[None]:
    """Print nothing on stdout in the block, unless this is the first process."""
    if rank_and_size()[0] == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield
