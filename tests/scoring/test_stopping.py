"""Early stop: which set must be stable, no synchronization, and the choice that the whole data would give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from plop_ext.collecting.collector import Collector
from plop_ext.collecting.totals_queue import TotalsQueue
from plop_ext.data import batches, encode, load_rows
from plop_ext.layers import discover
from plop_ext.models import load_model
from plop_ext.scores import Scores
from plop_ext.scoring import run as run_module
from plop_ext.scoring.score import score
from plop_ext.statistics import StopRule
from tests.support.tiny_models import Plain
from tests.support.toy_signal import aligned, toy_data


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Callable[..., Any]]:
    model, tokenizer = load_model("plop-tiny", device="cpu")
    encoded = encode(load_rows("arithmetic", max_samples=512), tokenizer)
    return model, lambda size=8: batches(encoded, batch_size=size, pad_token_id=tokenizer.pad_token_id)


def test_the_embedded_model_settles_early_on_the_same_placement(embedded: Any) -> None:
    model, data = embedded
    full = score(model, data(32), max_samples=None, progress=False)
    assert len(full.sample_ids) == 512 and full.provenance["stop"] is None
    same = 0
    for seed in range(5):
        early = score(model, data(), max_samples=512, stop="settled", seed=seed, progress=False)
        stop = early.provenance["stop"]
        assert stop["settled"] and stop["samples"] == len(early.sample_ids) <= 51
        assert stop["available"] == 512 and stop["settled_at"] >= 4 and stop["stability"] >= 0.99
        same += early.place().modules == full.place().modules
    assert same == 5


def test_what_is_read_before_a_stop_is_a_random_sample(embedded: Any) -> None:
    """`batches` puts the longest samples first; an early stop that took those would score another task."""
    model, data = embedded
    taken = [score(model, data(), seed=seed, progress=False).sample_ids.tolist() for seed in (0, 1)]
    longest = next(iter(data()))["sample_ids"].tolist()
    assert taken[0] != taken[1] and set(taken[0]) != set(longest)
    assert taken[0] == score(model, data(), seed=0, progress=False).sample_ids.tolist()


def test_the_default_stops_early_and_a_number_of_samples_is_read_whole() -> None:
    model = aligned()
    assert score(model, toy_data(50), progress=False).provenance["stop"]["settled"]
    assert len(score(model, toy_data(50), max_samples=20, progress=False).sample_ids) == 20
    assert len(score(model, toy_data(50), max_samples=None, progress=False).sample_ids) == 100
    assert len(score(model, toy_data(50), stop=None, progress=False).sample_ids) == 100
    assert len(score(model, toy_data(80), stop=None, progress=False).sample_ids) == 128
    assert score(model, toy_data(2), compat="paper-script", progress=False).provenance["stop"] is None


def test_never_before_4_samples_and_64_for_modules() -> None:
    model = aligned()
    types = score(model, toy_data(50, size=1), progress=False)
    assert types.provenance["stop"]["settled_at"] == 4
    single = score(model, toy_data(100, size=1), stop=StopRule(modules=4), progress=False)
    assert single.provenance["stop"]["settled_at"] == 64
    assert single.provenance["stop"]["types"] is None and single.provenance["stop"]["modules"] == 4
    later = score(model, toy_data(50, size=1), stop=StopRule(min_samples=10), progress=False)
    assert later.provenance["stop"]["settled_at"] == 10


class Split(torch.nn.Module):
    """`a` shrinks the first half of the features, `b` the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({n: torch.nn.Linear(16, 16) for n in "ab"})])
        self.layers[0]["a"].weight.data[:, :8] *= 0.2
        self.layers[0]["b"].weight.data = self.layers[0]["a"].weight.data.flip(1).clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0]["a"](x) + self.layers[0]["b"](x)


def test_a_tie_across_the_cut_reads_on_to_the_cap_and_reports_that_it_is_not_stable() -> None:
    """Every other sample lies in the half that `a` shrinks, the rest in the half that `b` does: neither is lower."""
    data = toy_data(64, size=4)
    for batch in data:
        batch[::2, :, 8:] = 0
        batch[1::2] = batch[::2].flip(-1)
    found = score(Split(), data, stop=StopRule(types=1), progress=False)
    stop = found.provenance["stop"]
    assert not stop["settled"] and stop["settled_at"] is None
    assert stop["samples"] == len(found.sample_ids) == 128 and 0.2 < stop["stability"] < 0.8
    assert [tie.crosses_cut for tie in found.statistics(1).ties] == [True]


def order_of(model: torch.nn.Module, data: list[torch.Tensor], rule: StopRule) -> tuple[str, Scores]:
    """The forwards (f) and reads of totals (digit: of which batch) of a run."""
    order: list[str] = []
    receive = TotalsQueue.batch

    def spy(self: TotalsQueue, batch: int) -> torch.Tensor:
        order.append(str(batch))
        return receive(self, batch)

    def forward(model: torch.nn.Module, batch: torch.Tensor) -> None:
        order.append("f")
        model(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TotalsQueue, "batch", spy)
        found = score(model, data, stop=rule, max_samples=None, forward=forward, progress=False)
    return "".join(order), found


def tied_data(count: int) -> list[torch.Tensor]:
    data = toy_data(count, size=2)
    for batch in data:
        batch[0, :, 8:] = 0
        batch[1] = batch[0].flip(-1)
    return data


def test_on_a_device_totals_are_read_one_batch_late_but_for_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Split()
    host = order_of(model, tied_data(6), StopRule(types=1))
    assert host[0] == "f0f1f2f3f4f5"
    monkeypatch.setattr(run_module, "input_device", lambda model: _Pretend())
    device = order_of(model, tied_data(6), StopRule(types=1))
    assert device[0] == "ff01ff2f3f45"
    assert len(device[1].sample_ids) == 12 and (device[1].totals.values == host[1].totals.values).all()
    # A set that settles at the first look costs no batch more than the rule asks for.
    settled = order_of(aligned(), toy_data(50), StopRule())
    assert settled[0] == "ff01" and settled[1].provenance["stop"]["settled_at"] == 4


def test_the_batch_under_way_when_the_set_settles_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "input_device", lambda model: _Pretend())
    looks = iter([0.5, 0.5, 1.0])
    monkeypatch.setattr("plop_ext.scoring.stopping.set_stability", lambda table, rule: next(looks))
    order, found = order_of(Split(), tied_data(20), StopRule(types=1))
    stop = found.provenance["stop"]
    assert order == "ff01ff2f3" and stop["settled_at"] == 8 and stop["samples"] == len(found.sample_ids) == 8


class _Pretend:
    """The host, looking like a CUDA device to the loop."""

    type = "cuda"


def test_batch_totals_are_those_of_the_batch(device: torch.device) -> None:
    model = Plain().to(device)
    data = [batch.to(device) for batch in toy_data(3, size=2)]
    with torch.no_grad(), Collector(model, discover(model).layers) as collector:
        for batch in data:
            collector.begin(2)
            model(batch)
            collector.end()
    parts = [collector.recording.queue.batch(number) for number in (1, 0, 2)]
    whole = collector.recording.queue.all()
    for number, part in zip((1, 0, 2), parts, strict=True):
        assert torch.equal(part, whole[:, 2 * number : 2 * number + 2])


@pytest.mark.gpu
def test_cuda_runs_as_the_loop_says_and_agrees_with_the_host() -> None:
    """While the totals of a batch are awaited, the next forward is in the queue."""
    order, found = order_of(Split().cuda(), tied_data(6), StopRule(types=1))
    assert order == "ff01ff2f3f45"
    torch.manual_seed(0)
    host = score(aligned(), toy_data(50), progress=False)
    device = score(aligned().cuda(), toy_data(50), progress=False)
    assert host.sample_ids.tolist() == device.sample_ids.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(device.nfn, host.nfn, rtol=1e-4)
    assert (found.totals.tokens > 0).all()
