"""One pass over the data: forwards, the journal, and the stop rule, which leaves the device idle at most once."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from plop_ext.collecting.collector import Collector
from plop_ext.collecting.totals_queue import TotalsQueue
from plop_ext.errors import InputError
from plop_ext.forwards.batch import input_device, listed_ids, take_sample_ids
from plop_ext.forwards.protocol import Forwards
from plop_ext.score_data.settings import Settings
from plop_ext.scoring.baseline import WeightNorms
from plop_ext.scoring.digest import data_hash, digest, on_host
from plop_ext.scoring.journal import Journal, Record
from plop_ext.scoring.outcome import Outcome
from plop_ext.scoring.stopping import StopWatch
from plop_ext.streams.batch import StreamReader
from plop_ext.totals import Totals


@dataclass
class Samples:
    """The scored samples of a run: id and batch of each sample, totals and fingerprint of each batch."""

    ids: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    tables: list[Totals] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of all inputs in the order of the run; None if some of them never were on the host."""
        return None if "" in self.digests else data_hash(self.digests)

    def outcome(self, collector: Collector, norms: WeightNorms, baselines: Sequence[float]) -> Outcome:
        """Return the numbers of the run, with the observations of `collector`."""
        return Outcome(
            totals=Totals.join_samples(self.tables),
            norms=norms,
            baselines=baselines,
            ids=self.ids,
            batches=self.batches,
            unassigned=collector.unassigned,
            experts_implementation=collector.experts_implementation,
        )

    def add(self, number: int, record: Record) -> None:
        """Add a batch."""
        self.ids += record.ids
        self.batches += [number] * len(record.ids)
        self.tables.append(record.totals)
        self.digests.append(record.digest)


class _Arrivals:
    """Receives the totals of batches in the order of the data, from the device or from the journal.

    Args:
        queue: The totals of forwards.
        journal: The journal to write them to.
        watch: The stop rule, evaluated batch by batch.

    Attributes:
        samples: The samples received so far.
    """

    def __init__(self, queue: TotalsQueue, journal: Journal | None, watch: StopWatch | None) -> None:
        self.samples = Samples()
        self._queue = queue
        self._journal = journal
        self._watch = watch
        self._expected: deque[tuple[int, Callable[[], Record]]] = deque()
        self._forwards = 0

    def expect(self, number: int, ids: tuple[int, ...], fingerprint: str, unassigned: dict[str, str]) -> None:
        """Expect the totals of the next forward, of the batch `number`."""
        self._expected.append((number, partial(self._receive, self._forwards, ids, fingerprint, unassigned)))
        self._forwards += 1

    def expect_known(self, number: int, record: Record) -> None:
        """Expect the batch `number`, which is in the journal."""
        self._expected.append((number, lambda: record))

    def take(self, keep: int) -> bool:
        """Receive all batches except the last `keep`; stop and return True if the stop rule is met."""
        while len(self._expected) > keep:
            number, receive = self._expected.popleft()
            self.samples.add(number, receive())
            if self._watch is not None and self._watch.look(self.samples.tables, len(self.samples.ids)):
                return True
        return False

    def _receive(self, forward: int, ids: tuple[int, ...], fingerprint: str, unassigned: dict[str, str]) -> Record:
        record = Record(ids, fingerprint, Totals(self._queue.batch(forward).numpy()), unassigned)
        if self._journal is not None:
            self._journal.append(record)
        return record


def run_batches(
    model: nn.Module,
    dataloader: Iterable[Any],
    collector: Collector,
    forwards: Forwards,
    settings: Settings,
    *,
    journal: Journal | None = None,
    watch: StopWatch | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> Samples:
    """Score batches until the data ends, `max_samples` are complete or the stop rule is met.

    On a CUDA device, totals are read one batch late: while the host reads the totals of one batch, the next batch is
    already queued on the device. Only the first evaluation of the stop rule synchronizes with the batch just queued,
    because most runs end there. The device is then idle once, for a few milliseconds, which is less than the time of
    one more batch. The batches read before an evaluation depend only on the data, so runs are reproducible. Batches of
    the journal are evaluated at the same points, so that a resumed run stops at the same batch.

    Args:
        model: Prepared for scoring.
        dataloader: Batches, as for `score`.
        collector: Entered.
        forwards: Entered within it.
        settings: Settings of the run; the last batch completes `max_samples`.
        journal: The journal, to which totals are written, and whose batches need no forward.
        watch: The stop rule.
        advance: Called with the number of samples of each batch.

    Raises:
        InputError: If there is no batch.
    """
    late = 1 if input_device(model).type == "cuda" else 0
    phases = random.Random(settings.seed)
    reader = StreamReader(model, settings.mask)
    arrivals = _Arrivals(collector.recording.queue, journal, watch)
    announced = 0
    for number, batch in enumerate(dataloader):
        phase = phases.randrange(settings.token_step)
        batch, sample_ids = take_sample_ids(batch)
        streams = reader.read(batch)
        size = streams.samples
        ids = tuple(listed_ids(sample_ids, announced, size))
        fingerprint = digest(batch) if journal is not None or on_host(batch) else ""
        known = journal.find(ids, fingerprint) if journal is not None else None
        announced += size
        if known is not None:
            collector.unassigned.update(known.unassigned)
            arrivals.expect_known(number, known)
        else:
            noted = set(collector.unassigned)
            forwards.run(batch, streams, step=settings.token_step, phase=phase)
            unassigned = {name: why for name, why in collector.unassigned.items() if name not in noted}
            arrivals.expect(number, ids, fingerprint, unassigned)
        settled = arrivals.take(0 if watch is not None and watch.first_is_due(announced) else late)
        advance(size)
        if settled or (settings.max_samples is not None and announced >= settings.max_samples):
            break
    arrivals.take(0)
    if not arrivals.samples.ids:
        raise InputError("`dataloader` is empty; give it at least one batch")
    return arrivals.samples
