"""The failure of one rank as an exception on all others."""

from __future__ import annotations

import json
from collections.abc import Sequence

from plop_ext.errors import InputError, OutputError, SetupError, first_line


class PeerError(Exception):
    """Another rank failed; the message names the rank and its error. All ranks know of it."""


class _PeerInputError(PeerError, InputError): ...


class _PeerOutputError(PeerError, OutputError): ...


class _PeerSetupError(PeerError, SetupError): ...


class _PeerRuntimeError(PeerError, RuntimeError): ...


class LostRank(SetupError):
    """A rank ended without a word, or does not answer; the message names it.

    Attributes:
        ranks: The ranks that are lost; empty if the connection failed.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


# The first that fits an error counts.
_KINDS: tuple[tuple[str, type[Exception], type[PeerError]], ...] = (
    ("output", OutputError, _PeerOutputError),
    ("input", InputError, _PeerInputError),
    ("setup", SetupError, _PeerSetupError),
)


def encode_failure(error: Exception) -> bytes:
    """Return an exception as plain data, for the other ranks."""
    kind = next((name for name, known, _ in _KINDS if isinstance(error, known)), "")
    text = str(error) if kind else f"{type(error).__name__}: {first_line(error)}"
    return json.dumps([kind, text]).encode()


def peer_error(rank: int, content: bytes) -> PeerError:
    """Return the exception that the other ranks raise for the failure of `rank`, of the same kind."""
    kind, text = json.loads(content)
    made = next((peer for name, _, peer in _KINDS if name == kind), _PeerRuntimeError)
    return made(f"rank {rank}{':' if kind else ' failed:'} {text}")
