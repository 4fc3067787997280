"""A batch ready to run, and the batches that run at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from plop_ext.errors import InputError
from plop_ext.forwards.batch import listed_ids, take_sample_ids
from plop_ext.scoring.digest import digest, on_host
from plop_ext.scoring.journal import Known, Record
from plop_ext.streams.batch import BatchStreams, StreamReader


@dataclass(frozen=True, eq=False)
class Turn:
    """A batch, without its ids.

    Attributes:
        batch: What the model is called with.
        streams: Its rows.
        ids: Id of each sample.
        digest: Fingerprint of the batch; empty if it is elsewhere than on the host and none is needed.
        known: Its record in the journal, with which it needs no forward.
    """

    batch: Any
    streams: BatchStreams
    ids: tuple[int, ...]
    digest: str
    known: Record | None


@dataclass(frozen=True, eq=False)
class Round:
    """The batches that run at the same time, one in each process.

    Attributes:
        sizes: Number of samples at each place in the order of the data; 0 if the data has ended there.
        place: This process's place.
        mine: Its batch, or None.
        in_step: The batch to run if this process has none that counts, because the forwards of the others wait for
            it; None if they do not.
    """

    sizes: Sequence[int]
    place: int
    mine: Turn | None
    in_step: Turn | None = None


class TurnReader:
    """Reads batches.

    Args:
        model: The model.
        mask: Tokens that count.
        known: The batches of the journal; None without a journal.
    """

    def __init__(self, model: nn.Module, mask: str, known: Known | None) -> None:
        self._streams = StreamReader(model, mask)
        self._known = known

    def read(self, batch: Any, announced: int | None) -> Turn:
        """Return a batch, ready to run.

        Args:
            batch: The batch.
            announced: Number of samples before it, which number its samples if it has no ids; None if nothing tells.

        Raises:
            InputError: If a mask, labels or ids do not fit the batch, or ids are missing.
        """
        batch, sample_ids = take_sample_ids(batch)
        if sample_ids is None and announced is None:
            raise InputError(
                "`dataloader` holds other batches on each rank, without `sample_ids`: a sample that a sampler repeats "
                "would count twice; add `sample_ids` to the batches, or give every rank the same batches"
            )
        streams = self._streams.read(batch)
        ids = tuple(listed_ids(sample_ids, announced or 0, streams.samples))
        fingerprint = digest(batch) if self._known is not None or on_host(batch) else ""
        found = None if self._known is None else self._known.find(ids, fingerprint)
        return Turn(batch, streams, ids, fingerprint, found)
