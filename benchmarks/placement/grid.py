"""The grid: every placement of a model on every task under both protocols, in groups of replicas."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.placement.encode import Encoded
from benchmarks.placement.journal import Deadline, Journal, Record
from benchmarks.placement.models import linear_modules
from benchmarks.placement.placements import Placement, Ranked, ranked
from benchmarks.placement.search import Run, wanted
from benchmarks.placement.settings import Settings
from benchmarks.placement.train import Group, Slot

KIND = "run"
_MARGIN = 1.3  # of the time that the last group of a width took
_FIRST = 30.0  # seconds that a group takes whose program is not built yet


@dataclass(frozen=True)
class Row:
    """One placement on one task under one protocol."""

    task: str
    protocol: str
    placement: Placement
    ranked: Ranked

    @property
    def fields(self) -> Record:
        """What its runs are found by in the journal."""
        return {"task": self.task, "protocol": self.protocol, "placement": self.placement.key}


def rows_of(
    model: nn.Module, task: str, placements: Sequence[Placement], protocols: Sequence[str], settings: Settings
) -> list[Row]:
    """The rows of a task. What has the budget of all-linear anyway is in the matched protocol only."""
    found = []
    everything = len(linear_modules(model))
    for protocol in protocols:
        for placement in placements:
            if protocol == "one-rank" and (placement.ranks or len(placement.modules) == everything):
                continue
            found.append(Row(task, protocol, placement, ranked(model, placement, protocol, settings.rank)))
    return found


class Grid:
    """Runs the rows of one model.

    Args:
        name: Of the model.
        model: The frozen base, on its device.
        data: Task -> split -> examples, on the device.
        rows: What to run.
        starts: (task, placement) -> initial A by module, where it is not PEFT's default.
        settings: Sizes.
        journal: Where finished runs are.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        data: Mapping[str, Mapping[str, Encoded]],
        rows: Sequence[Row],
        starts: Mapping[tuple[str, str], Mapping[str, Tensor]],
        settings: Settings,
        journal: Journal,
    ) -> None:
        self.name, self.model, self.data, self.rows = name, model, data, rows
        self.starts, self.settings, self.journal = starts, settings, journal
        self.groups: dict[int, Group] = {}
        self.seconds: dict[int, float] = {}
        self.done: dict[tuple[str, ...], dict[Run, float | None]] = defaultdict(dict)
        for record in journal.read(KIND, model=name):
            self.done[_key(record)][record["rate"], record["seed"]] = record["validation_loss"]

    def run(self, deadline: Deadline, environment: int) -> bool:
        """Run groups until nothing is left, or until the next would not end in time.

        Args:
            deadline: When to stop.
            environment: Number of the record of hardware and versions.

        Returns:
            Whether the rows are complete.
        """
        while group := self._next():
            width, members = group
            if not deadline.allows(_MARGIN * self.seconds.get(width, _FIRST)):
                return False
            self._run_group(width, members, environment)
        return True

    def pending(self) -> dict[int, list[tuple[Row, Run]]]:
        """Runs to do, by the width that their ranks are padded to."""
        found = defaultdict[int, list[tuple[Row, Run]]](list)
        for row in self.rows:
            largest = max(row.ranked.ranks.values())
            width = next(width for width in self.settings.rank_bins if width >= largest)
            done = self.done[_key(row.fields)]
            runs = wanted(self.settings.rates, self.settings.search_seeds, self.settings.seeds, done)
            found[width] += [(row, run) for run in runs]
        return {width: runs for width, runs in found.items() if runs}

    def _next(self) -> tuple[int, list[tuple[Row, Run]]] | None:
        """A full group of the width with most runs; if there is none, the widest with narrower ones beside it."""
        pending, slots = self.pending(), self.settings.slots
        if not pending:
            return None
        width = max(pending, key=lambda each: len(pending[each]))
        if len(pending[width]) < slots:
            width = max(pending)
        fitting = [each for other in sorted(pending, reverse=True) if other <= width for each in pending[other]]
        return width, fitting[:slots]

    def _run_group(self, width: int, members: Sequence[tuple[Row, Run]], environment: int) -> None:
        started = time.monotonic()
        if width not in self.groups:
            self.groups[width] = Group(
                self.model, self.data, self.settings, self.settings.slots, width, self.settings.steps
            )
            built = time.monotonic()
            print(f"{self.name}: program of width {width} built in {built - started:.1f} s")
            started = built
        slots = [
            Slot(row.task, row.ranked.ranks, rate, seed, self.starts.get((row.task, row.placement.key)))
            for row, (rate, seed) in members
        ]
        outcomes = self.groups[width].run(slots)
        if next(self.model.parameters()).is_cuda:
            torch.cuda.synchronize()
        seconds = self.seconds[width] = time.monotonic() - started
        records: list[dict[str, Any]] = []
        for (row, (rate, seed)), outcome in zip(members, outcomes, strict=True):
            self.done[_key(row.fields)][rate, seed] = outcome.validation_loss
            records.append(
                {
                    "kind": KIND,
                    "model": self.name,
                    **row.fields,
                    "rate": rate,
                    "seed": seed,
                    **asdict(outcome),
                    "parameters": row.ranked.parameters,
                    "capped": row.ranked.capped,
                    "environment": environment,
                }
            )
        self.journal.append(records)
        left = sum(len(each) for each in self.pending().values())
        print(f"{self.name}: {len(members)} runs of width {width} in {seconds:.1f} s; {left} pending")


def _key(fields: Mapping[str, Any]) -> tuple[str, ...]:
    return fields["task"], fields["protocol"], fields["placement"]
