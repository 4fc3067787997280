"""How rounds are ordered, repeated and compared."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import pytest
import torch

from benchmarks import timing


def test_rounds_are_interleaved_and_warm_up_is_not_counted() -> None:
    order: list[str] = []
    candidates = [timing.Candidate(name, lambda _, name=name: order.append(name)) for name in "abc"]
    seconds = timing.measure(candidates, torch.device("cpu"), rounds=30, warmup=2)
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(rounds) == 32 and set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert {name: len(values) for name, values in seconds.items()} == {"a": 30, "b": 30, "c": 30}


@pytest.mark.parametrize("count", [1, 2, 3, 6, 11])
def test_orders_are_balanced(count: int) -> None:
    size = count * (1 + count % 2)
    stream = timing.orders(count)
    for block in (list(itertools.islice(stream, size)) for _ in range(3)):
        assert all(sorted(order) == list(range(count)) for order in block)
        places = Counter((place, number) for order in block for place, number in enumerate(order))
        behind = Counter(pair for order in block for pair in itertools.pairwise(order))
        assert len(places) == count**2 and set(places.values()) == {size // count}
        assert len(behind) == count * (count - 1) and len(set(behind.values())) <= 1


def test_a_lead_runs_in_front_unmeasured_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    candidate = timing.Candidate("a", lambda _: order.append("run"))
    for lead, expected in ((False, "wait record run record"), (True, "wait run record run record")):
        order.clear()
        assert timing.measure([candidate], torch.device("cuda"), rounds=1, warmup=0, lead=lead) == {"a": [0.002]}
        assert order == expected.split()


def test_more_rounds_run_until_the_time_is_up() -> None:
    candidate = timing.Candidate("a", lambda _: time.sleep(0.01))
    assert len(timing.measure([candidate], torch.device("cpu"), rounds=1, at_least_s=0.1)["a"]) > 2


def test_ratios_are_taken_round_by_round() -> None:
    summary = timing.ratios([2.0, 4.0, 30.0], [1.0, 2.0, 10.0])
    assert summary.median == 2.0 and summary.p20 == 2.0 and 2.0 < summary.p80 < 3.0
    assert summary.row("x", digits=1) == {"x": 2.0, "x_p20": 2.0, "x_p80": 2.6}
