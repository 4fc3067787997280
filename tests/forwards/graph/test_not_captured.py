"""`score(graph=True)` where a forward cannot be captured: it says why, and scores as an eager run does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext.collecting.collector import Collector
from plop_ext.forwards.graph.forwards import GraphedForwards
from plop_ext.layers import discover
from plop_ext.streams.batch import BatchStreams
from tests.support.graphed import Batch, floats, model_on, padded, plain, same, scored
from tests.support.tiny_models import Plain

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 16 counted tokens", "ignore:.*expert projections")


class Refuses:
    """A forward that runs eagerly `good` times and then cannot be captured."""

    def __init__(self, refuse: Callable[[], object], good: int) -> None:
        self.refuse = refuse
        self.good = good
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        self.calls += 1
        if self.calls == self.good + 1:
            self.refuse()
        return model(batch["x"])


def refuse_on(device: torch.device, how: str) -> None:
    if device.type == "cpu":
        raise RuntimeError("not while capturing")
    if how == "a wait":  # that the eager trial did not have
        torch.cuda.current_stream().synchronize()
    elif how == "pageable memory":
        torch.ones(1).to(device, non_blocking=True)
    else:
        torch.empty(1 << 50, device=device)


@pytest.mark.parametrize("how", ["a wait", "pageable memory", "too little memory"])
def test_a_capture_that_fails_costs_nothing_but_the_graphs(how: str, graphing: torch.device) -> None:
    model = Plain().to(graphing)
    forward = Refuses(lambda: refuse_on(graphing, how), good=1)
    on_gpu = graphing.type == "cuda"
    stream = torch.cuda.current_stream() if on_gpu else None
    with pytest.warns(
        UserWarning, match="`graph`: batches are scored eagerly, because the forward cannot be captured"
    ):
        graphed = scored(model, floats(5), graph=True, forward=forward)
    assert same(graphed, scored(model, floats(5)))
    report = graphed.provenance["graph"]
    assert (report["captured"], report["replayed"]) == (0, 0)
    assert "RuntimeError" in report["reason"] or "Error" in report["reason"]
    assert forward.calls == 6  # five batches, and one attempt
    if on_gpu:
        assert torch.cuda.current_stream() == stream
        torch.cuda.empty_cache()
        torch.nn.functional.dropout(torch.ones(100, device="cuda"), 0.5)
        torch.cuda.synchronize()
    assert scored(model, floats(4), graph=True).provenance["graph"]["replayed"] == 3


def test_a_failed_capture_after_others_that_did_not(graphing: torch.device) -> None:
    model = Plain().to(graphing)
    # Two eager forwards and one capture precede it; on a CPU the stand-in calls the forward at a replay too.
    forward = Refuses(lambda: refuse_on(graphing, "a wait"), good=4 if graphing.type == "cpu" else 3)
    batches = [batch if i % 2 == 0 else {"x": batch["x"][:, :8]} for i, batch in enumerate(floats(6))]
    with pytest.warns(UserWarning, match="cannot be captured"):
        graphed = scored(model, batches, graph=True, forward=forward)
    assert (graphed.provenance["graph"]["captured"], graphed.provenance["graph"]["replayed"]) == (1, 1)
    assert same(graphed, scored(model, batches))


@pytest.mark.gpu
def test_a_forward_that_waits_is_not_captured() -> None:
    model = Plain().cuda()

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"] * (1.0 if batch["x"].sum().item() < 1e9 else 0.0))

    with pytest.warns(UserWarning, match=rf"synchronizes with the device \({Path(__file__).name}:\d+\)"):
        graphed = scored(model, floats(5), graph=True, forward=forward)
    assert graphed.provenance["graph"]["captured"] == 0
    assert same(graphed, scored(model, floats(5), forward=forward))


@pytest.mark.gpu
def test_a_wait_that_does_not_come_again_delays_the_capture() -> None:
    model = Plain().cuda()
    ready: list[bool] = []

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        if not ready:
            ready.append(bool(batch["x"].isfinite().all()))
        return model(batch["x"])

    graphed = scored(model, floats(5), graph=True, forward=forward)
    assert graphed.provenance["graph"] == {"captured": 1, "replayed": 3, "reason": None}


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_transformers_under_a_forward_of_its_own_or_positions_of_the_batch_looks_at_values(masked: bool) -> None:
    model = model_on("llama", torch.device("cuda"))
    data = [(padded if masked else plain)(2, 24, i) for i in range(4)]
    cases: list[tuple[list[Any], dict[str, Any]]] = [
        (data, {"forward": lambda model, batch: model(batch["input_ids"], attention_mask=batch["attention_mask"])}),
        ([{**batch, "position_ids": torch.arange(24).expand(2, 24)} for batch in data], {}),
        ([(batch["input_ids"], batch["attention_mask"]) for batch in data], {"mask": "all"}),
    ]
    for batches, settings in cases:
        with pytest.warns(UserWarning, match=r"synchronizes with the device \(masking_utils.py"):
            graphed = scored(model, batches, graph=True, **settings)
        assert same(graphed, scored(model, batches, **settings))


def test_weights_on_several_devices_are_scored_eagerly(graphing: torch.device) -> None:
    model = Plain().to(graphing)
    model.head.register_parameter("elsewhere", nn.Parameter(torch.empty(1, device="meta")))
    with Collector(model, discover(model).layers) as collector, torch.no_grad():
        with pytest.warns(UserWarning, match=rf"the weights are on several devices \({graphing.type}.*, meta\)"):
            graphed = GraphedForwards(model, lambda model, batch: model(batch["x"]), collector)
        with graphed:
            for batch in floats(3):
                graphed.run(batch, BatchStreams.of_mask(2, None))
        assert collector.recording.queue.all().shape == (4, 6, 5) and graphed.report()["graph"]["replayed"] == 0


def test_a_foreign_object_in_a_batch_is_said_so(graphing: torch.device) -> None:
    model = Plain().to(graphing)
    batches = [{**batch, "cache": object()} for batch in floats(3)]
    report = scored(model, batches, graph=True).provenance["graph"]
    assert report == {
        "captured": 0,
        "replayed": 0,
        "reason": "a batch holds a object, whose values cannot be compared",
    }


@pytest.mark.parametrize("name", ["is_tracing", "find_packed_sequence_indices"])
def test_a_transformers_that_decides_elsewhere_is_not_graphed(
    name: str, graphing: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import masking_utils

    model, batches = model_on("llama", graphing), [plain(2, 24, i) for i in range(3)]
    expected = scored(model, batches)
    function = getattr(masking_utils, name)
    monkeypatch.delattr(masking_utils, name)
    # The model itself calls it under another name.
    for caller in [
        value
        for value in vars(masking_utils).values()
        if isinstance(value, FunctionType) and name in value.__code__.co_names
    ]:
        renamed = tuple(f"new_{name}" if used == name else used for used in caller.__code__.co_names)
        monkeypatch.setattr(caller, "__code__", caller.__code__.replace(co_names=renamed))
    monkeypatch.setattr(masking_utils, f"new_{name}", function, raising=False)
    with pytest.warns(UserWarning, match=rf"transformers [\d.]+ decides on attention masks in an .* no `{name}`"):
        graphed = scored(model, batches, graph=True)
    assert graphed.provenance["graph"]["captured"] == 0 and f"no `{name}`" in graphed.provenance["graph"]["reason"]
    assert same(graphed, expected)
