"""The ranks of one scoring run, and what they tell each other: over gloo, on the host, in a group of their own.

Every exchange starts with one sum over a table with a row per rank, in which a rank can say that it failed. So a
failure between two exchanges reaches all ranks in the next one, wherever in the code they wait for it.
"""

from __future__ import annotations

import datetime
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from plop_ext.distributed.failure import LostRank, PeerError, encode_failure, peer_error
from plop_ext.distributed.handshake import RollCall
from plop_ext.errors import first_line

# Values of a rank in one exchange, behind its state.
WIDTH = 4
_WELL, _FAILED = 0, 1
# Seconds that a rank that lost the connection waits for the others, which may be in a forward: so long, and twice as
# long as it took between two of the last collectives.
_GRACE, _LATELY = 2.0, 6


class Group:
    """The ranks of a process group, entered by all of them; a context manager.

    The user's group is never used for the exchanges, because its timeout, its streams and its order of collectives
    are the model's.

    Args:
        roll: The ranks, which have all called.
        timeout: Seconds after which a rank that does not answer counts as lost.

    Attributes:
        rank: This process's rank in the group.
        size: Number of ranks.
        ranks: Their ranks among all processes.
    """

    def __init__(self, roll: RollCall, timeout: float) -> None:
        self.rank, self.size, self.ranks = roll.rank, roll.size, roll.ranks
        self._roll = roll
        self._timeout = timeout
        self._in_collectives = False
        self._gloo: distributed.ProcessGroup | None = None
        self._last = time.monotonic()
        self._lately: deque[float] = deque(maxlen=_LATELY)

    def __enter__(self) -> Group:
        self._gloo = self._roll.new_group("gloo", datetime.timedelta(seconds=self._timeout))
        return self

    def __exit__(self, *unused: object) -> None:
        self._leave()
        self._roll.close()

    def exchange(self, *values: int) -> list[list[int]]:
        """Return the values that each rank gave, by rank; at most `WIDTH` each.

        Raises:
            PeerError: If a rank failed; an `InputError` and the like stay what they are.
            LostRank: If a rank ended, or does not answer.
        """
        table = self._sum(_WELL, values)
        if table[:, 0].any():
            raise self._failure_of_peers(b"", table)
        return table[:, 1 : 1 + len(values)].tolist()

    def gather(self, content: bytes) -> list[bytes]:
        """Return the contents that each rank gave, by rank; raises as `exchange`."""
        return self._gathered(content, [size for (size,) in self.exchange(len(content))])

    def share(self, content: bytes) -> bytes:
        """Return the content that rank 0 gave; raises as `exchange`."""
        return self.gather(content if self.rank == 0 else b"")[0]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the other ranks of an exception that leaves the block: they raise it too, from their next exchange."""
        try:
            yield
        except Exception as error:
            known = isinstance(error, (PeerError, LostRank))
            if not known and not self._in_collectives:
                self._announce(error)
            raise

    @contextmanager
    def in_collectives(self) -> Iterator[None]:
        """Run collectives of the model within the block.

        An exception in it cannot be told to the other ranks, which wait for this one in a collective of the model, and
        not in an exchange. They end when this process ends: by the launcher, or by their own timeout.
        """
        self._in_collectives = True
        yield
        self._in_collectives = False

    def _announce(self, error: Exception) -> None:
        try:
            table = self._sum(_FAILED, ())
            self._failure_of_peers(encode_failure(error), table)
        except LostRank:  # the error itself says more
            pass

    def _failure_of_peers(self, own: bytes, table: Tensor) -> Exception:
        """Exchange the texts of the failures, and return that of the first rank that failed."""
        sizes = self._reduced(_row(self.rank, self.size, [len(own)]))[:, 0].tolist()
        texts = self._gathered(own, sizes)
        first = int(table[:, 0].nonzero()[0])
        return peer_error(first, texts[first])

    def _sum(self, state: int, values: Sequence[int]) -> Tensor:
        filled = [*values, *[0] * (WIDTH - len(values))]
        return self._reduced(_row(self.rank, self.size, [state, *filled]))

    def _reduced(self, table: Tensor) -> Tensor:
        self._collective(distributed.all_reduce, table)
        return table

    def _gathered(self, content: bytes, sizes: Sequence[int]) -> list[bytes]:
        longest = max(sizes)
        if longest == 0:
            return [b""] * self.size
        padded = torch.zeros(longest, dtype=torch.uint8)
        if content:
            padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.size)]
        self._collective(distributed.all_gather, found, padded)
        return [each[:size].numpy().tobytes() for each, size in zip(found, sizes, strict=True)]

    def _collective(self, run: Callable[..., Any], *args: Any) -> None:
        """Run a collective, and name the ranks that are lost if it fails."""
        self._lately.append(time.monotonic() - self._last)
        try:
            run(*args, group=self._gloo)
            self._last = time.monotonic()
            return
        except RuntimeError as error:
            text = first_line(error)
            traceback.clear_frames(error.__traceback__)  # they hold the group, whose end the other ranks notice
        self._leave()
        raise self._roll.explain_loss(text, self._timeout, _GRACE + 2 * max(self._lately))

    def _leave(self) -> None:
        if self._gloo is not None:
            distributed.destroy_process_group(self._gloo)
            self._gloo = None


def _row(rank: int, size: int, values: Sequence[int]) -> Tensor:
    """Return a table with a row per rank, zero but for this rank's."""
    table = torch.zeros(size, len(values), dtype=torch.int64)
    table[rank] = torch.tensor(values, dtype=torch.int64)
    return table
