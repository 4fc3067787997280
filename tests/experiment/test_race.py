"""The order of the trials: tuning, halving, rates beyond the edges, finalists, and the same again after a kill."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from plop_ext.experiment.race import Outcome, Trial, race
from plop_ext.experiment.schedule import Rung, Schedule, full

LABELS = ("all", "a", "b", "c")
RATES = (1.0, 4.0, 16.0)


def parabola(best: dict[str, float], floor: dict[str, float]) -> Callable[[Trial], Outcome]:
    """Loss with its lowest value `floor` at the rate `best`, lower with more steps."""

    def ask(trial: Trial) -> Outcome:
        label = trial.candidate
        loss = floor[label] + math.log(trial.rate / best[label]) ** 2 + 1 / trial.steps
        return Outcome(loss, diverged=not math.isfinite(loss))

    return ask


BEST = {"all": 4.0, "a": 4.0, "b": 64.0, "c": 0.25}
FLOOR = {"all": 1.0, "a": 0.9, "b": 0.8, "c": 1.2}


def asked(schedule: Schedule, ask: Callable[[Trial], Outcome]) -> tuple[list[Trial], dict]:
    trials: list[Trial] = []

    def record(trial: Trial) -> Outcome:
        trials.append(trial)
        return ask(trial)

    return trials, race(schedule, LABELS, record)


def test_full_grid_tunes_each_candidate_then_runs_every_seed() -> None:
    trials, standings = asked(full(RATES, (3, 4), 10, finalists=4, widen=0), parabola(BEST, FLOOR))
    assert trials[:12] == [Trial(label, rate, 3, 10, False) for label in LABELS for rate in RATES]
    assert {label: standings[label].rate for label in LABELS} == {"all": 4.0, "a": 4.0, "b": 16.0, "c": 1.0}
    assert [standings[label].at_edge for label in LABELS] == [False, False, True, True]
    final = [(trial.seed, trial.candidate) for trial in trials[12:]]
    assert final == [(seed, label) for seed in (3, 4) for label in ("all", "a", "b", "c")]
    assert all(set(standings[label].finals) == {3, 4} for label in LABELS)


def test_rates_beyond_the_edges_are_tried_until_the_best_is_inside() -> None:
    trials, standings = asked(full(RATES, (0,), 10, finalists=4, widen=3), parabola(BEST, FLOOR))
    assert [(t.candidate, t.rate) for t in trials[12:-4]] == [("b", 64.0), ("b", 256.0), ("c", 0.25), ("c", 0.0625)]
    assert standings["b"].rate == 64.0 and standings["c"].rate == 0.25
    assert not any(standing.at_edge for standing in standings.values())


def test_finalists_are_the_reference_and_the_best_on_validation() -> None:
    _, standings = asked(full(RATES, (0, 1), 10, finalists=2, widen=0), parabola(BEST, FLOOR))
    assert [label for label in LABELS if standings[label].finals] == ["all", "a"]


def test_halving_keeps_the_best_arms_with_the_reference() -> None:
    schedule = Schedule(RATES, (Rung(5, 3), Rung(10)), 0, 20, (0, 1), 2)
    slow = {**FLOOR, "all": 9.0}
    trials, standings = asked(schedule, parabola(BEST, slow))
    second = [(trial.candidate, trial.rate) for trial in trials if trial.steps == 10]
    assert len(second) == 3 and ("all", 4.0) in second and ("a", 4.0) in second
    assert [label for label in LABELS if standings[label].finals] == ["all", "a"]
    assert len(trials) == schedule.most_trials(4)


def test_diverged_rates_lose_and_diverged_candidates_are_no_finalists() -> None:
    def ask(trial: Trial) -> Outcome:
        bad = trial.candidate == "b" or (trial.candidate == "a" and trial.rate > 1)
        return Outcome(math.nan if bad else 2.0 + 1 / trial.rate, diverged=bad)

    _, standings = asked(full(RATES, (0, 1), 10, finalists=4, widen=1), ask)
    assert standings["a"].rate == 1.0 and standings["a"].finals
    assert standings["b"].rate is None and standings["b"].diverged and not standings["b"].finals
    assert [math.isnan(loss) for _, _, loss in standings["b"].tuning] == [True] * 3


def test_everything_may_diverge() -> None:
    for schedule in (full(RATES, (0,), 5, 4, 2), Schedule(RATES, (Rung(5, 4), Rung(10)), 0, 20, (0,), 2)):
        trials, standings = asked(schedule, lambda trial: Outcome(math.inf, diverged=False))
        assert len(trials) == 12 and all(standing.diverged for standing in standings.values())


def test_a_divergence_in_the_final_is_one_of_the_candidate() -> None:
    def ask(trial: Trial) -> Outcome:
        bad = trial.final and trial.candidate == "a" and trial.seed == 1
        return Outcome(math.nan if bad else 2.0, diverged=bad)

    _, standings = asked(full(RATES, (0, 1), 10, finalists=4, widen=0), ask)
    assert standings["a"].diverged and not standings["b"].diverged and len(standings["a"].finals) == 2


@pytest.mark.parametrize("known", range(0, 20, 3))
def test_what_is_known_already_changes_nothing(known: int) -> None:
    schedule = Schedule(RATES, (Rung(5, 6), Rung(10)), 0, 20, (0, 1, 2), 3)
    ask = parabola(BEST, FLOOR)
    trials, expected = asked(schedule, ask)
    recorded = {trial: ask(trial) for trial in trials[:known]}
    again, standings = asked(schedule, lambda trial: recorded.get(trial) or ask(trial))
    assert again == trials and standings == expected
