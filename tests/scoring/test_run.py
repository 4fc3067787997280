"""The loop over the batches, with forwards and a stop rule made by hand. Whole runs: test_journal, test_stopping."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext.collecting.totals_queue import TotalsQueue
from plop_ext.errors import InputError
from plop_ext.score_data.settings import Settings
from plop_ext.scoring import run as run_module
from plop_ext.scoring import turn as turn_module
from plop_ext.scoring.baseline import WeightNorms
from plop_ext.scoring.digest import data_hash, digest
from plop_ext.scoring.journal import Journal
from plop_ext.scoring.run import Samples, run_batches
from plop_ext.streams.batch import BatchStreams


def settings(**changes: Any) -> Settings:
    default = {"mask": "attention", "baseline": "frobenius", "probes": 8, "include": None, "exclude": ()}
    whole = {"scope": "language", "max_samples": None, "token_step": 1, "seed": 0}
    return Settings(**{**default, **whole, **changes})


class Run:
    """Stands for the collector and the forwards: the n-th forward gives each sample the sums n, in one module."""

    def __init__(self) -> None:
        self.queue = TotalsQueue(1)
        self.recording = self
        self.unassigned: dict[str, str] = {}
        self.calls: list[tuple[Any, BatchStreams, int, int]] = []
        self.order: list[str] = []
        self.reasons: dict[int, dict[str, str]] = {}

    def run(self, batch: Any, streams: BatchStreams, *, step: int, phase: int) -> None:
        number = len(self.calls)
        self.order.append(f"f{number}")
        self.calls.append((batch, streams, step, phase))
        self.unassigned.update(self.reasons.get(number, {}))
        self.queue.send(torch.full((1, streams.samples, 5), float(number), dtype=torch.float64))

    def over(self, data: Iterable[Any], configured: Settings | None = None, **changes: Any) -> Samples:
        collector: Any = self
        return run_batches(nn.Linear(1, 1), data, collector, collector, configured or settings(), **changes)


class Watch:
    """A stop rule that is met at `settles` samples and first due at 4; notes each look."""

    def __init__(self, run: Run, settles: int) -> None:
        self.run, self.settles, self.looked = run, settles, 0

    def first_is_due(self, samples: int) -> bool:
        return self.looked == 0 and samples >= 4

    def look(self, tables: Sequence[Any], samples: int) -> bool:
        assert sum(table.tokens.shape[1] for table in tables) == samples
        self.run.order.append(f"l{samples}")
        self.looked = samples if samples >= 4 else 0
        return samples >= self.settles


def batches(*sizes: int) -> list[Tensor]:
    return [torch.full((size, 3), float(number)) for number, size in enumerate(sizes)]


def test_samples_are_numbered_in_the_order_of_the_data() -> None:
    run, data, advanced = Run(), batches(2, 1, 3), list[int]()
    samples = run.over(data, advance=advanced.append)
    assert samples.ids == [0, 1, 2, 3, 4, 5] and samples.batches == [0, 0, 1, 2, 2, 2] and advanced == [2, 1, 3]
    assert [table.tokens.tolist() for table in samples.tables] == [[[0.0] * 2], [[1.0]], [[2.0] * 3]]
    assert samples.digests == [digest(batch) for batch in data] and samples.fingerprint == data_hash(samples.digests)
    assert [
        (batch is given, streams.samples, *rest)
        for (batch, streams, *rest), given in zip(run.calls, data, strict=True)
    ] == [(True, 2, 1, 0), (True, 1, 1, 0), (True, 3, 1, 0)]


def test_ids_of_the_data_are_kept_and_the_others_count_all_samples_before() -> None:
    run, (first, second) = Run(), batches(2, 1)
    samples = run.over([{"x": first, "sample_ids": torch.tensor([9, 4])}, {"x": second}])
    assert samples.ids == [9, 4, 2]
    assert [list(call[0]) for call in run.calls] == [["x"], ["x"]]


@pytest.mark.parametrize(("mask", "expected"), [("attention", [True, False, True]), ("all", None)])
def test_the_mask_of_the_settings_decides_what_counts(mask: str, expected: list[bool] | None) -> None:
    run = Run()
    run.over([{"x": torch.ones(1, 3), "attention_mask": torch.tensor([[1, 0, 1]])}], settings(mask=mask))
    rows = run.calls[0][1].rows("text", False, 3)
    assert not isinstance(rows, str)
    assert (rows.counted if rows.counted is None else rows.counted.tolist()) == expected


def test_the_first_token_read_is_drawn_for_each_batch() -> None:
    run = Run()
    run.over(batches(*[1] * 9), settings(token_step=50, seed=7))
    drawn = random.Random(7)
    assert [(step, phase) for *_, step, phase in run.calls] == [(50, drawn.randrange(50)) for _ in range(9)]


@pytest.mark.parametrize(("limit", "forwards"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (9, 3), (None, 3)])
def test_the_batch_that_completes_the_samples_is_the_last(limit: int | None, forwards: int) -> None:
    run = Run()
    assert len(run.over(batches(2, 2, 2), settings(max_samples=limit)).ids) == 2 * forwards
    assert len(run.calls) == forwards


def test_no_batch_is_an_error() -> None:
    with pytest.raises(InputError) as caught:
        Run().over([])
    assert str(caught.value) == "`dataloader` is empty; give it at least one batch"


def test_data_elsewhere_has_a_fingerprint_only_for_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module, "on_host", lambda batch: bool((batch == 0).all()))
    data = batches(1, 1)
    samples = Run().over(data)
    assert samples.digests == [digest(data[0]), ""] and samples.fingerprint is None
    with Journal(tmp_path / "run.partial", {}, [], resume=False) as journal:
        assert Run().over(data, journal=journal).digests == [digest(batch) for batch in data]


def test_batches_of_the_journal_need_no_forward(tmp_path: Path) -> None:
    path, data, configured = tmp_path / "run.partial", batches(2, 1, 3), settings(token_step=50)
    first, whole = Run(), Run()
    first.reasons = {0: {"a": "in the first"}, 1: {"b": "in the second", "a": "again"}}
    with Journal(path, {}, [], resume=False) as journal:
        first.over(data[:2], configured, journal=journal)
    assert [dict(record.unassigned) for record in Journal(path, {}, [], True).records] == [
        {"a": "in the first"},
        {"b": "in the second"},
    ]
    expected = whole.over(data, configured)
    resumed, advanced = Run(), list[int]()
    with Journal(path, {}, [], resume=True) as journal:
        samples = resumed.over(data, configured, journal=journal, advance=advanced.append)
    assert samples.ids == expected.ids and samples.batches == expected.batches and samples.digests == expected.digests
    assert advanced == [2, 1, 3] and resumed.unassigned == {"a": "in the first", "b": "in the second"}
    # What was drawn for the batches of the journal is not drawn again.
    assert [call[2:] for call in resumed.calls] == [whole.calls[2][2:]]
    assert [float(table.tokens[0, 0]) for table in samples.tables] == [0.0, 1.0, 0.0]
    assert [record.ids for record in Journal(path, {}, [], True).records] == [(0, 1), (2,), (3, 4, 5)]


@pytest.mark.parametrize(
    ("device", "settles", "order", "samples"),
    [
        ("cpu", 99, "f0 l2 f1 l4 f2 l6 f3 l8 f4 l10", 10),
        ("cpu", 6, "f0 l2 f1 l4 f2 l6", 6),
        # Totals arrive one batch late, except for the first look; the batch under way does not count.
        ("cuda", 99, "f0 f1 l2 l4 f2 f3 l6 f4 l8 l10", 10),
        ("cuda", 4, "f0 f1 l2 l4", 4),
        ("cuda", 6, "f0 f1 l2 l4 f2 f3 l6", 6),
        ("cuda", 8, "f0 f1 l2 l4 f2 f3 l6 f4 l8", 8),
    ],
)
def test_when_totals_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, device: str, settles: int, order: str, samples: int
) -> None:
    monkeypatch.setattr(run_module, "input_device", lambda model: SimpleNamespace(type=device))
    run = Run()
    watch: Any = Watch(run, settles)
    found = run.over(batches(*[2] * 5), watch=watch)
    assert " ".join(run.order) == order and len(found.ids) == samples


def test_without_a_stop_rule_totals_of_a_device_are_one_batch_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "input_device", lambda model: SimpleNamespace(type="cuda"))
    run = Run()
    receive = run.queue.batch
    monkeypatch.setattr(run.queue, "batch", lambda number: (run.order.append(f"r{number}"), receive(number))[1])
    run.over(batches(4, 4, 4))
    assert run.order == ["f0", "f1", "r0", "f2", "r1", "r2"]


def test_the_outcome_has_what_the_collector_saw() -> None:
    run = Run()
    samples = run.over([{"x": torch.ones(2, 1), "sample_ids": torch.tensor([5, 3])}, {"x": torch.ones(1, 1)}])
    norms = WeightNorms([1.0], {})
    samples.unassigned["b"] = "why"
    collector: Any = SimpleNamespace(experts_implementation="eager")
    outcome = samples.outcome(collector, norms, [2.0])
    assert outcome.totals.tokens.tolist() == [[0.0, 0.0, 1.0]]
    assert outcome.norms is norms and outcome.baselines == [2.0]
    assert outcome.ids == [5, 3, 2] and outcome.batches == [0, 0, 1]
    assert (outcome.unassigned, outcome.experts_implementation) == ({"b": "why"}, "eager")
