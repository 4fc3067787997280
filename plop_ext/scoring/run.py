"""One pass over the data: forwards, the journal, and the stop rule, which leaves the device idle at most once."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from plop_ext.collecting.collector import Collector
from plop_ext.collecting.totals_queue import TotalsQueue
from plop_ext.errors import InputError
from plop_ext.forwards.batch import input_device
from plop_ext.forwards.protocol import Forwards
from plop_ext.score_data.settings import Settings
from plop_ext.scoring.baseline import WeightNorms
from plop_ext.scoring.digest import data_hash
from plop_ext.scoring.journal import Journal, Known, Record
from plop_ext.scoring.outcome import Outcome
from plop_ext.scoring.ranks import Alone, Ranks
from plop_ext.scoring.stopping import StopWatch
from plop_ext.scoring.turn import Turn, TurnReader
from plop_ext.totals import Totals


@dataclass
class Samples:
    """The scored samples of a run: id and batch of each sample, totals and fingerprint of each batch.

    `unassigned` names the layers with rows that could not be assigned to samples, and the reason.
    """

    ids: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    tables: list[Totals] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    unassigned: dict[str, str] = field(default_factory=dict)

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
            unassigned=self.unassigned,
            experts_implementation=collector.experts_implementation,
        )

    def add(self, number: int, record: Record) -> None:
        """Add a batch."""
        self.ids += record.ids
        self.batches += [number] * len(record.ids)
        self.tables.append(record.totals)
        self.digests.append(record.digest)
        self.unassigned = {**record.unassigned, **self.unassigned}


class _Arrivals:
    """Receives the totals of batches in the order of the data, from devices, other processes or the journal.

    Args:
        ranks: The processes of the run.
        queue: The totals of the forwards of this process.
        journal: The journal to write to; None where another process writes it, or none does.
        watch: The stop rule, evaluated batch by batch.

    Attributes:
        samples: The samples received so far.
    """

    def __init__(self, ranks: Ranks, queue: TotalsQueue, journal: Journal | None, watch: StopWatch | None) -> None:
        self.samples = Samples()
        self._ranks = ranks
        self._queue = queue
        self._journal = journal
        self._watch = watch
        self._expected: deque[tuple[list[int], Callable[[], Record | None]]] = deque()
        self._forwards = 0
        self._numbers = 0

    def launched(self) -> Callable[[], Totals]:
        """Return what receives the totals of the forward that was just launched."""
        number, self._forwards = self._forwards, self._forwards + 1
        return lambda: Totals(self._queue.batch(number).numpy())

    def expect(self, places: list[int], mine: Callable[[], Record | None]) -> None:
        """Expect the batches at `places` of a round, and from this process its own record, or None."""
        self._expected.append((places, mine))

    def take(self, keep: int) -> bool:
        """Receive all rounds except the last `keep`; stop and return True if the stop rule is met.

        Batches behind the one at which it is met do not count: how many there are depends on the device and on the
        number of processes.
        """
        while len(self._expected) > keep:
            places, mine = self._expected.popleft()
            found = self._ranks.records(mine())
            scored = [record for place in places if (record := found[place]) is not None]
            counted = [self._ranks.without_repeats(record) for record in scored]
            count, settled = len(scored), False
            if self._watch is not None:
                count, settled = self._ranks.decided(*self._judge(self._watch, counted))
            for each, record in zip(scored[:count], counted, strict=False):
                self._add(each, record)
            if settled:
                self._expected.clear()
                return True
        return False

    def _judge(self, watch: StopWatch, records: Sequence[Record]) -> tuple[int, bool]:
        """Return how many of the batches count, and whether the stop rule is met by then."""
        tables, samples = list(self.samples.tables), len(self.samples.ids)
        for count, record in enumerate(records, start=1):
            tables.append(record.totals)
            samples += len(record.ids)
            if watch.look(tables, samples):
                return count, True
        return len(records), False

    def _add(self, scored: Record, counted: Record) -> None:
        if self._journal is not None and not self._journal.known.holds(scored):
            first = {name: why for name, why in scored.unassigned.items() if name not in self.samples.unassigned}
            self._journal.append(replace(scored, unassigned=first))
        if counted.ids or not scored.ids:  # not a batch of repeats
            self.samples.add(self._numbers, counted)
            self._numbers += 1


def run_batches(
    model: nn.Module,
    dataloader: Iterable[Any],
    collector: Collector,
    forwards: Forwards,
    settings: Settings,
    *,
    ranks: Ranks | None = None,
    journal: Journal | None = None,
    known: Known | None = None,
    watch: StopWatch | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> Samples:
    """Score batches until the data ends, `max_samples` are complete or the stop rule is met.

    On a CUDA device, totals are read one round late: while the host reads the totals of one batch, the next batch is
    already queued on the device. Only the first evaluation of the stop rule synchronizes with the batch just queued,
    because most runs end there. The device is then idle once, for a few milliseconds, which is less than the time of
    one more batch. The stop rule is evaluated batch by batch in the order of the data, so that the samples that count
    depend on the data alone. Batches of the journal are evaluated at the same points, so that a resumed run stops at
    the same batch.

    Args:
        model: Prepared for scoring.
        dataloader: Batches, as for `score`.
        collector: Entered.
        forwards: Entered within it.
        settings: Settings of the run; the last batch completes `max_samples`.
        ranks: The processes of the run; None is this one alone.
        journal: The journal, to which totals are written.
        known: The batches in the journal, which need no forward; by default those of `journal`.
        watch: The stop rule.
        advance: Called with the number of samples of each batch.

    Raises:
        InputError: If there is no batch.
    """
    ranks = ranks or Alone()
    known = journal.known if known is None and journal is not None else known
    late = 1 if input_device(model).type == "cuda" else 0
    phases = random.Random(settings.seed)
    arrivals = _Arrivals(ranks, collector.recording.queue, journal, watch)
    announced = 0

    def launch(turn: Turn, phase: int) -> tuple[Callable[[], Totals], dict[str, str]]:
        noted = set(collector.unassigned)
        with ranks.forward():
            forwards.run(turn.batch, turn.streams, step=settings.token_step, phase=phase)
        return arrivals.launched(), {name: why for name, why in collector.unassigned.items() if name not in noted}

    for turns in ranks.rounds(dataloader, TurnReader(model, settings.mask, known)):
        places, phase = list[int](), 0
        for place, size in enumerate(turns.sizes):
            if size and (settings.max_samples is None or announced < settings.max_samples):
                drawn = phases.randrange(settings.token_step)
                phase = drawn if place == turns.place else phase
                places.append(place)
                announced += size
                advance(size)
        mine = turns.mine if turns.place in places else None
        if mine is not None and mine.known is None:
            arrivals.expect(places, partial(_record, mine, *launch(mine, phase)))
        else:
            if turns.in_step is not None:
                for name in launch(turns.in_step, 0)[1]:  # nothing of this forward counts
                    del collector.unassigned[name]
            if mine is not None and mine.known is not None:
                collector.unassigned.update(mine.known.unassigned)
            arrivals.expect(places, partial(_known, mine))
        settled = arrivals.take(0 if watch is not None and watch.first_is_due(announced) else late)
        if settled or (settings.max_samples is not None and announced >= settings.max_samples):
            break
    arrivals.take(0)
    if not arrivals.samples.ids:
        raise InputError("`dataloader` is empty; give it at least one batch")
    return arrivals.samples


def _record(turn: Turn, totals: Callable[[], Totals], unassigned: dict[str, str]) -> Record:
    """Return the record of a batch whose forward was launched. Waits for it."""
    return Record(turn.ids, turn.digest, totals(), unassigned)


def _known(turn: Turn | None) -> Record | None:
    """Return the record of a batch in the journal."""
    return None if turn is None else turn.known
