"""When the stop rule is evaluated, on which modules, and what is reported of it. Whole runs: test_stopping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from plop_ext.scoring import stopping
from plop_ext.scoring.stopping import StopWatch
from plop_ext.statistics import GainTable, StopRule
from plop_ext.totals import Totals
from tests.support.found_layers import expert, found_layer
from tests.support.totals import make_totals

LAYERS = [found_layer("0.up"), found_layer("0.down"), expert("0.e")]


def one_sample(tokens: Sequence[float] = (1, 1, 16)) -> Totals:
    column = np.array(tokens, dtype=np.float64)[:, None]
    return make_totals(3, 1, tokens=column, sum_gain=2 * column)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[GainTable]:
    """The tables that are evaluated; the stability rises by 0.1 from 0.6."""
    seen: list[GainTable] = []

    def stability(table: GainTable, rule: StopRule) -> float:
        assert rule.types == 2
        seen.append(table)
        return (5 + len(seen)) / 10

    monkeypatch.setattr(stopping, "set_stability", stability)
    return seen


def watch(baseline: Sequence[float] = (0.5, 2.0, 1.0), **rule: Any) -> StopWatch:
    return StopWatch(StopRule(types=2, **rule), LAYERS, baseline)


def test_the_first_evaluation_is_the_only_one_that_is_first(tables: list[GainTable]) -> None:
    made = watch(min_samples=3)
    assert [made.first_is_due(samples) for samples in (2, 3, 4)] == [False, True, True]
    assert not made.look([one_sample()] * 2, 2) and made.first_is_due(3) and not tables
    made.look([one_sample()] * 3, 3)
    assert not made.first_is_due(3) and not made.first_is_due(30) and len(tables) == 1


def test_a_run_settles_once_the_stability_reaches_the_confidence(tables: list[GainTable]) -> None:
    made = watch(confidence=0.8)
    found = [made.look([one_sample()] * samples, samples) for samples in range(1, 8)]
    assert found == [False] * 5 + [True] * 2
    # Once settled, it is not evaluated again.
    assert [table.samples for table in tables] == [4, 5, 6]
    assert made.report(9, 128) == {
        "rule": "settled",
        "types": 2,
        "modules": None,
        "confidence": 0.8,
        "settled": True,
        "settled_at": 6,
        "stability": 0.8,
        "samples": 9,
        "available": 128,
    }


def test_evaluations_become_rare_after_64_samples(tables: list[GainTable]) -> None:
    made = watch(confidence=1.0)
    for samples in (64, 79, 80, 99):
        made.look([one_sample()] * 2, samples)
    assert len(tables) == 2 and not made.settled


def test_the_report_of_a_run_that_read_all_data(tables: list[GainTable]) -> None:
    made = StopWatch(StopRule(modules=0.5), LAYERS, [1.0] * 3)
    assert made.report(3, None) == {
        "rule": "settled",
        "types": None,
        "modules": 0.5,
        "confidence": 0.99,
        "settled": False,
        "settled_at": None,
        "stability": None,
        "samples": 3,
        "available": None,
    }
    made = watch()
    assert not made.look([one_sample()] * 4, 4)
    assert made.report(4, None)["stability"] == 0.6 and made.report(4, None)["settled_at"] is None


def names(table: GainTable) -> list[str]:
    return [table.types[index] for index in table.type_index]


def test_all_samples_and_modules_are_evaluated(tables: list[GainTable]) -> None:
    watch().look([one_sample((1, 2, 10)), one_sample((3, 4, 6))], 4)
    (table,) = tables
    assert names(table) == ["up", "down", "e"]
    assert table.tokens.tolist() == [[1, 3], [2, 4], [10, 6]] and table.baseline.tolist() == [0.5, 2.0, 1.0]
    assert table.sum_gain.tolist() == (2 * table.tokens).tolist() and table.out_features.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("tokens", "baseline", "expected"),
    [
        ((1, 1, 16), (1, 1, 1), ["up", "down", "e"]),
        ((1, 1, 15), (1, 1, 1), ["up", "down"]),
        ((0, 1, 16), (1, 1, 1), ["down", "e"]),
        ((1, 1, 16), (1, 0, 1), ["up", "e"]),
        ((1, 1, 16), (math.nan, 0.5, math.inf), ["down"]),
    ],
)
def test_modules_that_would_have_no_score_are_left_out(
    tables: list[GainTable], tokens: Sequence[float], baseline: Sequence[float], expected: list[str]
) -> None:
    watch(baseline).look([one_sample(tokens)], 4)
    (table,) = tables
    assert names(table) == expected
    kept = zip(baseline, ("up", "down", "e"), strict=True)
    assert table.baseline.tolist() == [value for value, name in kept if name in expected]


def test_without_any_module_nothing_is_evaluated(tables: list[GainTable]) -> None:
    made = watch()
    assert not made.look([one_sample((0, 0, 0))], 4)
    assert tables == [] and made.stability is None and not made.first_is_due(4)


@pytest.mark.parametrize(
    ("limit", "settled_first", "stops_at"), [("64 samples", 4, 64), ("4 times as many as settled", 20, 80)]
)
def test_experts_with_too_few_tokens_delay_the_stop_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, limit: str, settled_first: int, stops_at: int
) -> None:
    monkeypatch.setattr(stopping, "set_stability", lambda table, rule: 1.0)
    made = watch(min_samples=settled_first)
    totals = one_sample((1, 1, 15))
    stopped = [samples for samples in range(settled_first, 200) if made.look([totals], samples)]
    assert stopped[0] == stops_at, limit


def test_a_run_stops_once_all_experts_have_enough_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "set_stability", lambda table, rule: 1.0)
    made = watch()
    assert not made.look([one_sample((1, 1, 3))] * 5, 5)
    assert made.look([one_sample((1, 1, 3))] * 6, 6)


def test_a_run_that_no_longer_is_stable_reads_on_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    made = watch()
    for stability, samples, stops in ((1.0, 4, False), (0.5, 64, False), (1.0, 80, True)):
        monkeypatch.setattr(stopping, "set_stability", lambda table, rule, value=stability: value)
        assert made.look([one_sample((1, 1, 15))], samples) is stops
