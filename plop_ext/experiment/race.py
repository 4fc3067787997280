"""Which trial comes next: tuning, the choice of finalists, and their final trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from plop_ext.experiment.schedule import Schedule

# Beyond the edge of a grid with one rate, the next rate differs by this factor.
_FACTOR = 4.0


@dataclass(frozen=True)
class Trial:
    """One short finetune.

    Attributes:
        candidate: Label of the candidate.
        rate: Peak learning rate.
        seed: Seed of the adapter's initial weights and of the order of the samples.
        steps: Optimizer steps.
        final: Whether it trains on all training samples and is measured on the test rows. A tuning trial trains on a
            part of the training samples and is measured on the validation rows, which are the rest.
    """

    candidate: str
    rate: float
    seed: int
    steps: int
    final: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kind = f"final, seed {self.seed}" if self.final else "tuning"
        return f"{self.candidate}, rate {self.rate:g}, {self.steps} steps, {kind}"


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    Attributes:
        loss: Mean loss on the rows it was measured on, in nats per token; NaN if it is not finite.
        diverged: Whether the training diverged.
        nats: Summed loss of each test row, in nats; empty for a tuning trial.
        seconds: Time of the whole trial.
        seconds_per_step: Mean time of an optimizer step.
    """

    loss: float
    diverged: bool
    nats: tuple[float, ...] = ()
    seconds: float = 0.0
    seconds_per_step: float = 0.0

    @property
    def judged(self) -> float:
        """The loss, or infinity if the trial diverged."""
        return math.inf if self.diverged or not math.isfinite(self.loss) else self.loss


@dataclass
class Standing:
    """What is known of a candidate.

    Attributes:
        tuning: Triples of steps, learning rate and validation loss (NaN if diverged), in the order of the trials.
        rate: The rate with the lowest validation loss, among the trials with most steps; None if all diverged.
        loss: That validation loss; infinity if all diverged.
        at_edge: Whether that rate is the lowest or highest that was tried: a better one may lie outside.
        finals: Final outcomes by seed; empty if it is no finalist.
    """

    tuning: list[tuple[int, float, float]] = field(default_factory=list)
    rate: float | None = None
    loss: float = math.inf
    at_edge: bool = False
    finals: dict[int, Outcome] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        """Whether no rate trained without diverging, or a final trial diverged."""
        return self.rate is None or any(math.isinf(outcome.judged) for outcome in self.finals.values())


def race(schedule: Schedule, labels: Sequence[str], ask: Callable[[Trial], Outcome]) -> dict[str, Standing]:
    """Run the trials of a schedule.

    The trials depend on the schedule and on the outcomes of earlier trials alone, so that a run that continues from a
    journal asks for the same ones.

    Args:
        schedule: The schedule.
        labels: The candidates, the reference first.
        ask: Returns the outcome of a trial.

    Returns:
        The standing of each candidate.
    """
    standings = {label: Standing() for label in labels}
    arms = [(label, rate) for label in labels for rate in schedule.rates]
    for rung in schedule.rungs:
        losses = {arm: _tune(ask, standings, *arm, schedule, rung.steps) for arm in arms}
        arms = arms if rung.keep is None else _kept(losses, rung.keep, labels)
    for label in dict.fromkeys(label for label, _ in arms):
        for _ in range(schedule.widen):
            beyond = _beyond(standings[label], schedule.rates)
            if beyond is None:
                break
            _tune(ask, standings, label, beyond, schedule, schedule.rungs[-1].steps)
    finalists = _finalists(schedule, labels, standings)
    for seed in schedule.seeds:
        for label in finalists:
            rate = standings[label].rate
            assert rate is not None
            standings[label].finals[seed] = ask(Trial(label, rate, seed, schedule.steps, True))
    return standings


def _tune(
    ask: Callable[[Trial], Outcome],
    standings: Mapping[str, Standing],
    label: str,
    rate: float,
    schedule: Schedule,
    steps: int,
) -> float:
    """Run a tuning trial and return its loss, infinity if it diverged."""
    outcome = ask(Trial(label, rate, schedule.seeds[0], steps, False))
    standing = standings[label]
    standing.tuning.append((steps, rate, math.nan if math.isinf(outcome.judged) else outcome.loss))
    longest = [(loss, rate) for done, rate, loss in standing.tuning if done == steps]
    usable = [pair for pair in longest if not math.isnan(pair[0])]
    standing.loss, standing.rate = min(usable) if usable else (math.inf, None)
    tried = [rate for _, rate, _ in standing.tuning]
    standing.at_edge = standing.rate in (min(tried), max(tried))
    return outcome.judged


def _kept(losses: Mapping[tuple[str, float], float], keep: int, labels: Sequence[str]) -> list[tuple[str, float]]:
    """Return the arms with the lowest losses, always with the best of the reference and the best of all others."""
    order = sorted(losses, key=lambda arm: (losses[arm], labels.index(arm[0]), arm[1]))
    own = [arm for arm in order if arm[0] == labels[0]][:1]
    others = [arm for arm in order if arm[0] != labels[0]][:1]
    chosen = set(list(dict.fromkeys([*own, *others, *order]))[:keep])
    return [arm for arm in losses if arm in chosen and math.isfinite(losses[arm])]


def _beyond(standing: Standing, rates: Sequence[float]) -> float | None:
    """Return a rate beyond the edge at which the best one is, or None."""
    if not standing.at_edge or standing.rate is None:
        return None
    factor = rates[-1] / rates[-2] if len(rates) > 1 else _FACTOR
    tried = [rate for _, rate, _ in standing.tuning]
    return standing.rate * factor if standing.rate == max(tried) else standing.rate / factor


def _finalists(schedule: Schedule, labels: Sequence[str], standings: Mapping[str, Standing]) -> list[str]:
    """Return the reference and the others with the lowest validation loss; never one whose rates all diverged."""
    most = max((max(steps for steps, _, _ in item.tuning) for item in standings.values()), default=0)
    usable = [
        label
        for label in labels
        if standings[label].rate is not None and max(steps for steps, _, _ in standings[label].tuning) == most
    ]
    others = sorted((label for label in usable if label != labels[0]), key=lambda label: standings[label].loss)
    first = [label for label in usable if label == labels[0]]
    return first + others[: schedule.finalists - len(first)]
