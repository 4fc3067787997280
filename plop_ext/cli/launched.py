"""A command in the processes of torchrun or accelerate launch."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from plop_ext.cli.launch import Launch
from plop_ext.distributed.failure import LostRank, PeerError
from plop_ext.distributed.group import Group
from plop_ext.distributed.handshake import RollCall
from plop_ext.errors import SetupError

# Seconds after which a process that does not answer counts as lost; models load at unlike speeds.
_TIMEOUT = 1800.0
# Seconds that a process waits for the words of another, before it prints the error itself.
_WORDS = 3.0
_SAID = "plop_ext/said"


@contextmanager
def joined(args: argparse.Namespace, rank: int) -> Iterator[Launch]:
    """Join the process group, and give this process its device.

    Raises:
        SetupError: If a process has no device.
    """
    local = int(os.environ.get("LOCAL_RANK", rank))
    cuda = torch.cuda.is_available() and args.device in (None, "cuda")
    if cuda:
        if local >= torch.cuda.device_count():
            raise SetupError(
                f"process {local} of this host has no GPU: torch sees {torch.cuda.device_count()}; start as many "
                "processes as there are GPUs (torchrun --nproc-per-node), or add --device cpu"
            )
        torch.cuda.set_device(local)
    mine = not distributed.is_initialized()
    if mine:
        distributed.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo")
    with Group(RollCall(distributed.group.WORLD, _TIMEOUT), _TIMEOUT) as group:
        yield _Launched(group, f"cuda:{local}" if cuda else None)
    if mine:
        distributed.destroy_process_group()


class _Launched(Launch):
    """One of several processes."""

    def __init__(self, group: Group, device: str | None) -> None:
        self.first, self.size, self.device = group.rank == 0, group.size, device
        self._group = group
        self._store: Any = distributed.distributed_c10d._get_default_store()

    def on_first(self, call: Callable[[], Any]) -> Any:
        with self._group.failing_together():
            return json.loads(self._group.share(json.dumps(call() if self.first else None).encode()))

    def wait(self) -> None:
        self._group.exchange()

    def tells(self, error: BaseException) -> bool:
        if isinstance(error, PeerError):
            self._said()
            return False
        if isinstance(error, LostRank):
            return self._group.rank == min(set(range(self.size)) - set(error.ranks), default=0)
        return self.first or self._said() != _text(error)

    def told(self, error: BaseException) -> None:
        try:
            self._store.set(_SAID, _text(error))
        except Exception:  # the store ended with the process that held it
            pass

    def _said(self) -> str:
        """Return the error that another process has printed, once it has; empty if none does."""
        deadline = time.monotonic() + _WORDS
        try:
            while time.monotonic() < deadline:
                if self._store.check([_SAID]):
                    return str(self._store.get(_SAID).decode())
                time.sleep(0.05)
        except Exception:  # the store ended with the process that held it
            pass
        return ""


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
