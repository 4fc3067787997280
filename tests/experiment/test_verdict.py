"""The verdict: every decision, the words it is said in, and what it never claims."""

from __future__ import annotations

import math
from typing import Any

import pytest

from plop_ext.experiment.intervals import Difference
from plop_ext.experiment.verdict import Finding, Verdict, judge


def between(low: float, high: float, *, confidence: float = 0.95, seeds: int = 5, rows: int = 200) -> Difference:
    half = (high - low) / 2
    over_seeds = half / math.sqrt(2) if seeds > 1 else math.nan
    return Difference((low + high) / 2, low, high, confidence, half / math.sqrt(2), over_seeds, rows, seeds)


HOME = Finding("all-linear", 1.0, False, None, 100.0)


def finding(label: str, found: Difference | None, loss: float = 1.0, **changes: Any) -> Finding:
    return Finding(label, loss, **{"diverged": False, "difference": found, "cost": 80.0, "saving": "", **changes})


def verdict(*others: Finding, reference: str | None = "all-linear") -> Verdict:
    return judge([HOME, *others], reference, 0.01)


def test_better() -> None:
    found = verdict(finding("lowest-3", between(-0.06, -0.02)))
    assert (found.decision, found.winner) == ("better", "lowest-3")
    assert found.sentence == (
        "lowest-3 is better than all-linear: -0.0400 nats per token (95 % interval -0.0600 to -0.0200; 200 test rows,"
        " 5 seeds)."
    )
    assert found.outcomes == {"all-linear": "reference", "lowest-3": "better"}


def test_of_several_better_ones_the_validation_rows_choose() -> None:
    corrected = {"confidence": 0.975}
    first = finding("a", between(-0.08, -0.04, **corrected), loss=0.9)
    second = finding("b", between(-0.06, -0.03, **corrected), loss=0.8)
    found = verdict(first, second)
    assert found.winner == "b" and "of 2 better ones the best on the validation rows" in found.sentence
    assert "corrected for 2 comparisons" in found.sentence


def test_worse() -> None:
    found = verdict(finding("a", between(0.02, 0.04), loss=1.5), finding("b", between(0.05, 0.06), loss=1.2))
    assert (found.decision, found.winner) == ("worse", "all-linear")
    assert found.sentence.startswith("all-linear is better than all 2 others: the difference of b, the best of them")
    assert verdict(finding("a", between(0.02, 0.04))).sentence.startswith(
        "all-linear is better than a: the difference is +0.0300 nats per token"
    )


class TestNoDifference:
    def test_the_cheaper_one_is_taken_and_its_saving_named(self) -> None:
        found = verdict(finding("lowest-3", between(-0.004, 0.006), saving="training adds 20 % less memory"))
        assert (found.decision, found.winner) == ("no difference", "lowest-3")
        assert "differ by less than 0.01 nats per token: +0.0010" in found.sentence
        assert found.sentence.endswith(
            "lowest-3 is taken because it is the cheaper one: training adds 20 % less memory."
        )

    def test_all_linear_is_taken_if_it_is_cheaper(self) -> None:
        found = verdict(finding("lowest-3", between(-0.004, 0.006), cost=120.0, saving="nothing"))
        assert found.winner == "all-linear" and found.sentence.endswith(
            "all-linear is taken because it is the cheaper one."
        )

    @pytest.mark.parametrize(("low", "high"), [(-0.008, -0.002), (0.002, 0.008)])
    def test_a_difference_below_the_margin_is_none_even_if_certain(self, low: float, high: float) -> None:
        assert verdict(finding("a", between(low, high))).decision == "no difference"

    @pytest.mark.parametrize(("low", "high"), [(-0.011, 0.001), (-0.001, 0.011)])
    def test_the_whole_interval_must_be_inside(self, low: float, high: float) -> None:
        assert verdict(finding("a", between(low, high))).decision == "not decided"


class TestNotDecided:
    def test_says_what_it_would_take(self) -> None:
        found = verdict(finding("a", between(-0.05, 0.03), loss=0.9), finding("b", between(0.02, 0.04)))
        assert (found.decision, found.winner) == ("not decided", "all-linear")
        assert found.sentence.startswith("Not decided between a and all-linear: -0.0100 nats per token")
        assert "a difference of this size would take about 3,200 test rows and" in found.sentence
        assert found.sentence.endswith("The adapter is that of all-linear.")
        assert found.outcomes["b"] == "worse"

    def test_one_seed_decides_nothing(self) -> None:
        found = verdict(finding("a", between(-0.5, -0.4, seeds=1)))
        assert found.decision == "not decided" and "one seed shows no spread between runs" in found.sentence


class TestDiverged:
    def test_is_an_outcome_of_the_candidate(self) -> None:
        found = verdict(finding("a", None, diverged=True), finding("b", between(0.02, 0.03)))
        assert found.outcomes == {"all-linear": "reference", "a": "diverged", "b": "worse"}
        assert found.sentence.startswith("all-linear is better than b")

    def test_all(self) -> None:
        found = judge([Finding("a", math.inf, True, None, 1.0)], None, 0.01)
        assert (found.decision, found.winner) == ("diverged", None)
        assert found.sentence == "Every candidate diverged; give lower learning rates."

    def test_alone(self) -> None:
        found = verdict(finding("a", None, diverged=True), finding("b", None))
        assert (found.decision, found.winner) == ("alone", "all-linear")
        assert found.outcomes["b"] == "not in the final"
