"""The trials of an experiment, fixed in steps before the first of them: what takes time later changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from plop_ext.errors import InputError

# Fewer steps than this say nothing about a placement; fewer seeds show no spread between runs.
MIN_STEPS = 20
MIN_SEEDS = 3
# Share of the given time that is planned for; the rest is for steps slower than those that were measured.
_PLANNED = 0.85


@dataclass(frozen=True)
class Rung:
    """One round of tuning: the steps of its trials, and how many arms go on to the next round (None: all)."""

    steps: int
    keep: int | None = None


@dataclass(frozen=True)
class Schedule:
    """The trials of an experiment. An arm is a candidate at a learning rate.

    Attributes:
        rates: Learning rates, ascending.
        rungs: Rounds of tuning, each with all arms that the round before kept. One rung is a full grid; several are
            successive halving.
        widen: Number of further rates that may be tried for a candidate whose best rate is at an edge of the grid.
        steps: Steps of the final trials.
        seeds: Seeds of the final trials; the first is that of tuning.
        finalists: Number of candidates in the final trials, with the reference.
    """

    rates: tuple[float, ...]
    rungs: tuple[Rung, ...]
    widen: int
    steps: int
    seeds: tuple[int, ...]
    finalists: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        rungs = [asdict(rung) for rung in self.rungs]
        return {**asdict(self), "rates": list(self.rates), "rungs": rungs, "seeds": list(self.seeds)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Schedule:
        """Make a schedule from the result of `to_dict`."""
        rungs = tuple(Rung(**rung) for rung in fields["rungs"])
        return cls(**{**fields, "rates": tuple(fields["rates"]), "rungs": rungs, "seeds": tuple(fields["seeds"])})

    def tuning_trials(self, candidates: int) -> list[tuple[int, int]]:
        """Return the number of trials and their steps for each rung, without those beyond the edges."""
        arms, found = candidates * len(self.rates), []
        for rung in self.rungs:
            found.append((arms, rung.steps))
            arms = arms if rung.keep is None else min(arms, rung.keep)
        return found

    def most_trials(self, candidates: int) -> int:
        """Return how many trials there are at most."""
        tuning = sum(trials for trials, _ in self.tuning_trials(candidates))
        return tuning + self.widen * candidates + self.finalists * len(self.seeds)

    def describe(self, candidates: int) -> str:
        """Return the schedule in words."""
        parts = [f"{trials} trials of {steps} steps" for trials, steps in self.tuning_trials(candidates)]
        kind = "tuning" if len(parts) == 1 else "tuning by successive halving"
        widen = f" (and up to {self.widen * candidates} beyond the edges of the rates)" if self.widen else ""
        final = f"final: {self.finalists} candidates x {len(self.seeds)} seeds of {self.steps} steps"
        return f"{kind}: {', then '.join(parts)}{widen}; {final}"


@dataclass(frozen=True)
class Speed:
    """The measured time of a trial: of a step for each candidate, of a held-out row, and of everything else.

    Attributes:
        step: Seconds of an optimizer step, by candidate.
        row: Seconds of a held-out row.
        start: Seconds to attach an adapter, and to remove it.
        validation_rows: Rows that a tuning trial is evaluated on.
        test_rows: Rows that a final trial is evaluated on.
    """

    step: Mapping[str, float]
    row: float
    start: float
    validation_rows: int
    test_rows: int

    def seconds(self, schedule: Schedule) -> float:
        """Predict the time of all trials of a schedule, with those beyond the edges."""
        slowest, count = max(self.step.values()), len(self.step)
        tuning = sum(
            trials * (self.start + steps * slowest + self.validation_rows * self.row)
            for trials, steps in schedule.tuning_trials(count)
        )
        last = schedule.rungs[-1].steps
        wider = schedule.widen * count * (self.start + last * slowest + self.validation_rows * self.row)
        finals = schedule.finalists * len(schedule.seeds)
        return tuning + wider + finals * (self.start + schedule.steps * slowest + self.test_rows * self.row)


def full(rates: Sequence[float], seeds: Sequence[int], steps: int, finalists: int, widen: int) -> Schedule:
    """Return the full grid: every candidate at every rate, then every finalist with every seed."""
    return Schedule(tuple(rates), (Rung(steps),), widen, steps, tuple(seeds), finalists)


def within(limit: float, wanted: Schedule, speed: Speed) -> Schedule:
    """Return the most thorough schedule that is predicted to take at most `limit` seconds.

    In this order: the wanted one; the same without rates beyond the edges; successive halving over candidates and
    rates; a final of two; three seeds; fewer steps.

    Raises:
        InputError: If even the smallest schedule takes longer.
    """
    halved = _halving(wanted, len(speed.step))
    two = replace(halved, finalists=min(2, halved.finalists))
    few = replace(two, seeds=two.seeds[:MIN_SEEDS])
    planned = _PLANNED * limit
    for schedule in (wanted, replace(wanted, widen=0), halved, two, few):
        if speed.seconds(schedule) <= planned:
            return schedule
    low, high = min(MIN_STEPS, wanted.steps), wanted.steps
    least = _halving(replace(few, steps=low), len(speed.step))
    if speed.seconds(least) > planned:
        needed = math.ceil(speed.seconds(least) / _PLANNED / 60)
        raise InputError(
            f"`max_seconds` is too short: {low} steps a trial take {needed} minutes; give more time, fewer candidates"
            " or rates, or a smaller batch"
        )
    while low < high - 1:
        middle = (low + high) // 2
        fits = speed.seconds(_halving(replace(few, steps=middle), len(speed.step))) <= planned
        low, high = (middle, high) if fits else (low, middle)
    return _halving(replace(few, steps=low), len(speed.step))


def _halving(schedule: Schedule, candidates: int) -> Schedule:
    """Return the schedule with tuning by successive halving: a quarter of the steps for all arms, half for half."""
    arms = candidates * len(schedule.rates)
    rungs = (Rung(max(1, schedule.steps // 4), max(2, math.ceil(arms / 2))), Rung(max(1, schedule.steps // 2)))
    return replace(schedule, rungs=rungs, widen=0)
