"""The first exchange of a run: all ranks of a process group call within a limit, or those that did are named."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import distributed

from plop_ext.distributed.failure import LostRank
from plop_ext.errors import InputError

# Seconds that a rank waits for the others to call.
LIMIT = 30.0
_PAUSE = 0.05

# Number of runs that the ranks of a group have begun together.
_runs: Counter[str] = Counter()


class RollCall:
    """The presence of the ranks of a group, in the store that they share.

    A store needs no answer from a rank, unlike a collective: so who is absent can be named.

    Args:
        group: The process group; this process is one of its ranks.
        limit: Seconds to wait for the other ranks; default `LIMIT`.

    Raises:
        InputError: If some ranks did not call within `limit`.
    """

    def __init__(self, group: Any, limit: float | None = None) -> None:
        limit = LIMIT if limit is None else limit
        self.ranks: list[int] = distributed.get_process_group_ranks(group)
        self.rank, self.size = distributed.get_rank(group), len(self.ranks)
        self._store: Any = distributed.distributed_c10d._get_default_store()
        name = ",".join(map(str, self.ranks))
        self._key = f"plop_ext/{name}/{_runs[name]}"
        self._set("here")
        absent = self._absent("here", limit)
        if absent:
            self._delete("here")
            called = [rank for rank in range(self.size) if rank not in absent]
            raise InputError(
                f"`process_group`: of {self.size} ranks only {_listed(called)} called within {limit:g} s, and not "
                f"{_listed(absent)}; call on every rank, or pass process_group=None to use this process alone"
            )
        _runs[name] += 1

    def new_group(self, backend: str, timeout: datetime.timedelta) -> Any:
        """Return a new process group of the same ranks."""
        if self.size == distributed.get_world_size():
            return distributed.new_group(backend=backend, timeout=timeout)
        # Ranks outside of a smaller group do not take part.
        return distributed.new_group(self.ranks, timeout, backend, use_local_synchronization=True)

    def explain_loss(self, error: str, timeout: float, grace: float) -> LostRank:
        """Return which ranks do not answer, after a collective failed with `error`.

        Args:
            error: Text of the error.
            timeout: Seconds after which the collective gave up.
            grace: Seconds to wait for the others, which may be in a forward, to notice the same.
        """
        try:
            self._set("alive")
            absent = self._absent("alive", grace)
        except Exception:  # the store ended with the process that held it
            return LostRank(
                f"the rank that holds the store of the process group ended, or cannot be reached ({error})", (0,)
            )
        if not absent:
            return LostRank(f"the connection between the ranks failed: {error}")
        verb = "ranks {} have" if len(absent) > 1 else "rank {} has"
        return LostRank(f"{verb.format(_listed(absent))} ended, or did not answer within {timeout:g} s", absent)

    def close(self) -> None:
        """Remove this rank's entries."""
        for what in ("here", "alive"):
            self._delete(what)

    def _name(self, what: str, rank: int) -> str:
        return f"{self._key}/{what}/{rank}"

    def _set(self, what: str) -> None:
        self._store.set(self._name(what, self.rank), "1")

    def _delete(self, what: str) -> None:
        try:
            self._store.delete_key(self._name(what, self.rank))
        except Exception:  # a store that cannot, or that has ended
            pass

    def _absent(self, what: str, limit: float) -> list[int]:
        """Return the ranks without an entry after at most `limit` seconds."""
        deadline = time.monotonic() + limit
        absent = list(range(self.size))
        while absent:
            absent = [rank for rank in absent if not self._store.check([self._name(what, rank)])]
            if not absent or time.monotonic() >= deadline:
                break
            time.sleep(_PAUSE)
        return absent


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
