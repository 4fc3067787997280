"""The schedule: what it holds, what it is predicted to take, and how it shrinks to a time."""

from __future__ import annotations

import json

import pytest

from plop_ext.errors import InputError
from plop_ext.experiment.schedule import MIN_STEPS, Rung, Schedule, Speed, full, within

WANTED = full((1e-3, 2e-3, 4e-3), (0, 1, 2, 3, 4), 100, finalists=4, widen=2)
SPEED = Speed({"all": 1.0, "a": 0.5, "b": 0.8, "c": 0.9}, row=0.1, start=2.0, validation_rows=20, test_rows=50)


def test_json_round_trip() -> None:
    halved = within(900.0, WANTED, SPEED)
    for schedule in (WANTED, halved):
        assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
        assert json.loads(json.dumps(schedule.to_dict())) == schedule.to_dict()


def test_trials_and_seconds_of_the_full_grid() -> None:
    assert WANTED.tuning_trials(4) == [(12, 100)] and WANTED.most_trials(4) == 12 + 8 + 20
    # 20 tuning trials of 2 + 100 * 1 + 20 * 0.1, and 20 final ones of 2 + 100 * 1 + 50 * 0.1.
    assert SPEED.seconds(WANTED) == pytest.approx(20 * 104 + 20 * 107)


def test_trials_of_successive_halving() -> None:
    schedule = Schedule((1e-3, 2e-3), (Rung(25, 4), Rung(50)), 0, 100, (0, 1, 2), 2)
    assert schedule.tuning_trials(4) == [(8, 25), (4, 50)] and schedule.most_trials(4) == 8 + 4 + 6
    assert SPEED.seconds(schedule) == pytest.approx(8 * 29 + 4 * 54 + 6 * 107)
    assert schedule.describe(4) == (
        "tuning by successive halving: 8 trials of 25 steps, then 4 trials of 50 steps; final: 2 candidates x 3 seeds"
        " of 100 steps"
    )


def test_enough_time_changes_nothing() -> None:
    assert within(1e6, WANTED, SPEED) == WANTED


def test_less_time_gives_less_in_a_fixed_order() -> None:
    found = [within(SPEED.seconds(WANTED) * share / 0.85, WANTED, SPEED) for share in (1.0, 0.9, 0.75, 0.5, 0.4, 0.2)]
    full_grid, no_edges, halved, two, few, short = found
    assert full_grid == WANTED and (no_edges.widen, no_edges.rungs) == (0, WANTED.rungs)
    assert len(halved.rungs) == 2 and halved.finalists == 4 and halved.steps == 100
    assert two.finalists == 2 and len(two.seeds) == 5
    assert few.seeds == (0, 1, 2) and few.steps == 100
    assert short.steps < 100 and short.rungs[0].steps == short.steps // 4


@pytest.mark.parametrize("limit", [420.0, 450.0, 600.0, 1000.0, 3000.0])
def test_the_time_is_kept_and_used(limit: float) -> None:
    schedule = within(limit, WANTED, SPEED)
    assert SPEED.seconds(schedule) <= 0.85 * limit and schedule.steps >= MIN_STEPS
    if schedule.steps < 100:
        more = Schedule.from_dict(schedule.to_dict() | {"steps": schedule.steps + 8})
        assert SPEED.seconds(more) > 0.8 * limit * 0.85


def test_too_little_time_is_refused_with_what_it_takes() -> None:
    with pytest.raises(InputError, match="`max_seconds` is too short: 20 steps a trial take 7 minutes; give"):
        within(60.0, WANTED, SPEED)
