"""`score(graph=True)`: the bits of an eager run, from forwards that are captured once and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext.cli.main import main
from plop_ext.collecting.collector import Collector
from plop_ext.errors import InputError
from plop_ext.forwards.graph import forwards as graphs
from plop_ext.forwards.graph.forwards import MAX_GRAPHS, GraphedForwards
from plop_ext.forwards.graph.inputs import on_device
from plop_ext.layers import discover
from plop_ext.scores import Scores
from plop_ext.scoring.score import find_plop_targets
from tests.support.architectures import ARCHITECTURES
from tests.support.graphed import Batch, padded, plain, same, scored
from tests.support.tiny_models import Plain

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 16 counted tokens", "ignore:.*expert projections")


def model_on(name: str, device: torch.device) -> nn.Module:
    """In bfloat16: of experts in float32 torch multiplies one after the other, and waits to know how many rows."""
    return ARCHITECTURES[name].build().to(device, torch.bfloat16)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return ARCHITECTURES["llama"].build()


# Batches, settings of `score`, graphs captured, batches replayed.
CASES: dict[str, tuple[list[Batch], dict[str, Any], int, int]] = {
    "unpadded": ([plain(2, 24, i) for i in range(4)], {}, 1, 3),
    "padded": ([padded(2, 24, i) for i in range(4)], {}, 1, 3),
    "padded or not": ([(plain, padded)[i % 2](2, 24, i) for i in range(6)], {}, 2, 4),
    "two shapes": ([plain(2, (24, 16)[i % 2], i) for i in range(6)], {}, 2, 4),
    "last one smaller": ([*(padded(3, 24, i) for i in range(3)), padded(1, 24, 3)], {}, 1, 2),
    "completion": ([padded(2, 24, i) for i in range(4)], {"mask": "completion"}, 1, 3),
    "completion, unpadded": ([plain(2, 24, i) for i in range(4)], {"mask": "completion"}, 1, 3),
    "all": ([padded(2, 24, i) for i in range(4)], {"mask": "all"}, 1, 3),
    "token_step": ([padded(2, 24, i) for i in range(20)], {"token_step": 4}, 4, 16),
    "paper-script": ([padded(2, 24, i) for i in range(4)], {"compat": "paper-script"}, 1, 3),
    "bool masks": (
        [{**padded(2, 24, i), "attention_mask": padded(2, 24, i)["attention_mask"].bool()} for i in (0, 1, 2)],
        {},
        1,
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "qwen3_moe"])
def test_scores_have_the_same_bits(name: str, case: str, graphing: torch.device) -> None:
    model, (batches, settings, captured, replayed) = model_on(name, graphing), CASES[case]
    before = [{key: value.clone() for key, value in batch.items()} for batch in batches]
    graphed = scored(model, batches, graph=True, **settings)
    assert graphed.provenance["graph"] == {"captured": captured, "replayed": replayed, "reason": None}
    assert same(graphed, scored(model, batches, **settings))
    assert all(torch.equal(batch[key], copy[key]) for batch, copy in zip(batches, before, strict=True) for key in copy)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*host wait for the device", "ignore:.*not scored", "ignore:.*input of zeros")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_the_same_bits_captured_or_not(name: str) -> None:
    case = ARCHITECTURES[name]
    model, batches = case.build().cuda(), [case.batch() for _ in range(3)]
    graphed = scored(model, batches, graph=True, **case.kwargs)
    assert same(graphed, scored(model, batches, **case.kwargs))
    report = graphed.provenance["graph"]
    assert report["replayed"] == 2 or "host wait for the device" in report["reason"]


@pytest.mark.filterwarnings("ignore:`fast=True`")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_fused_kernels_are_captured(name: str, graphing: torch.device) -> None:
    model, batches = model_on(name, graphing), [padded(2, 24, i) for i in range(4)]
    graphed = scored(model, batches, fast=True, graph=True)
    assert graphed.provenance["graph"] == {"captured": 1, "replayed": 3, "reason": None}
    expected = scored(model, batches, fast=True)
    assert same(graphed, expected) and graphed.provenance["fast"] == expected.provenance["fast"]


def test_batches_on_the_device(graphing: torch.device) -> None:
    model = model_on("llama", graphing)
    batches = [on_device(padded(2, 24, i), graphing) for i in range(4)]
    for batch in batches:
        batch["attention_mask"] = batch["attention_mask"].bool()
    before = [batch["attention_mask"].clone() for batch in batches]
    expected = scored(model, batches)
    graphed = scored(model, batches, graph=True)
    assert graphed.provenance["graph"]["replayed"] == 3 and same(graphed, expected)
    assert all(torch.equal(batch["attention_mask"], mask) for batch, mask in zip(batches, before, strict=True))


def test_a_model_of_plain_torch_whose_forward_is_given(graphing: torch.device) -> None:
    """The mask stays what it is, also where it masks nothing."""
    model = Plain().to(graphing)
    masks = [torch.ones(2, 12), torch.ones(2, 12), torch.tensor([[1.0] * 12, [1.0] * 7 + [0.0] * 5])]
    batches = [{"x": torch.randn(2, 12, 16), "attention_mask": mask} for mask in (*masks, *masks)]

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.pop("x") * batch["attention_mask"].unsqueeze(-1))

    graphed = scored(model, batches, graph=True, forward=forward)
    assert graphed.provenance["graph"] == {"captured": 1, "replayed": 5, "reason": None}
    with warnings.catch_warnings(record=True):
        assert same(graphed, scored(model, batches, forward=forward))


def test_more_shapes_than_graphs(graphing: torch.device) -> None:
    model = model_on("llama", graphing)
    batches = [plain(1, 8 + length, length) for length in range(MAX_GRAPHS + 3)] * 3
    graphed = scored(model, batches, graph=True)
    report = graphed.provenance["graph"]
    assert (report["captured"], report["replayed"]) == (MAX_GRAPHS, 2 * MAX_GRAPHS)
    assert report["reason"] == f"there are more than {MAX_GRAPHS} kinds of batches; the others ran eagerly"
    assert same(graphed, scored(model, batches))


def test_shapes_that_never_come_back_are_said_so(graphing: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_REMEMBERED", 2)
    model = model_on("llama", graphing)
    batches = [plain(1, 20 - length % 4, length) for length in range(8)]  # the third is forgotten when it comes back
    graphed = scored(model, batches, graph=True)
    report = graphed.provenance["graph"]
    assert (report["captured"], report["replayed"]) == (0, 0) and "no batch was like an earlier one" in report[
        "reason"
    ]
    assert same(graphed, scored(model, batches))


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


def floats(count: int) -> list[Batch]:
    return [{"x": torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(i))} for i in range(count)]


def refuse_on(device: torch.device, how: str) -> None:
    if device.type == "cpu":
        raise RuntimeError("not while capturing")
    if how == "a wait":  # that the rehearsal did not have
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

    with pytest.warns(UserWarning, match=r"makes the host wait for the device \(test_graph.py:\d+\)"):
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
        with pytest.warns(UserWarning, match=r"makes the host wait for the device \(masking_utils.py"):
            graphed = scored(model, batches, graph=True, **settings)
        assert same(graphed, scored(model, batches, **settings))


@pytest.mark.gpu
def test_the_random_state_is_left_as_found() -> None:
    model = model_on("llama", torch.device("cuda"))
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    scored(model, [plain(2, 24, i) for i in range(4)], graph=True)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    drawn = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)


@pytest.mark.gpu
def test_runs_keep_no_memory() -> None:
    model, data = model_on("llama", torch.device("cuda")), [padded(2, 24, i) for i in range(4)]
    held = []
    for _ in range(4):
        scored(model, data, graph=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[1] == held[2] == held[3]  # the first also leaves cuBLAS its workspaces


def test_what_is_forgotten_is_rehearsed_again(graphing: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `forget` the next batch of a kind runs eagerly, whether its like was rehearsed or captured."""
    rehearsed: list[int] = []
    rehearse = GraphedForwards._rehearse
    model, batches = Plain().to(graphing), floats(8)

    def noted(self: GraphedForwards, *args: Any) -> None:
        rehearsed.append(current)
        rehearse(self, *args)

    monkeypatch.setattr(GraphedForwards, "_rehearse", noted)
    with Collector(model, discover(model).layers) as collector, torch.no_grad():
        with GraphedForwards(model, lambda model, batch: model(batch["x"]), collector) as graphed:
            for current, batch in enumerate(batches):
                if current in (1, 4):
                    graphed.forget()
                graphed.run(batch, 2, None)
            assert graphed.report()["graph"] == {"captured": 2, "replayed": 5, "reason": None}
        totals = collector.totals()
    assert rehearsed == [0, 1, 4]
    with Collector(model, discover(model).layers) as collector, torch.no_grad():
        for batch in batches:
            collector.begin(2, None)
            model(batch["x"].to(graphing))
            collector.end()
        assert torch.equal(totals, collector.totals())


def test_an_exception_between_replays_leaves_the_model_as_it_was(graphing: torch.device) -> None:
    model = model_on("llama", graphing)
    batches = [padded(2, 24, i) for i in range(4)]
    expected = scored(model, batches)

    def broken() -> Iterator[Batch]:
        yield from batches
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        scored(model, broken(), graph=True)
    assert not any(module._forward_hooks for module in model.modules())
    assert same(scored(model, batches, graph=True), expected) and same(scored(model, batches), expected)


def test_resumed_with_and_without(graphing: torch.device, tmp_path: Path) -> None:
    """The bits are the same either way, so a run may go on without graphs, or with them."""
    model = model_on("llama", graphing)
    batches = [padded(2, 24, i) for i in range(8)]
    expected = scored(model, batches, token_step=2)

    def cut() -> Iterator[Batch]:
        yield from batches[:5]
        raise KeyboardInterrupt

    for first in (True, False):
        path = tmp_path / f"{first}.journal"
        with pytest.raises(KeyboardInterrupt):
            scored(model, cut(), token_step=2, graph=first, journal=path)
        assert path.exists()
        resumed = scored(model, batches, token_step=2, graph=not first, journal=path, resume=True)
        assert same(resumed, expected)


def test_stops_where_an_eager_run_does(graphing: torch.device) -> None:
    model = model_on("llama", graphing)
    batches = [padded(2, 24, i) for i in range(12)]
    settings = {"stop": "settled", "max_samples": 24}
    graphed, expected = scored(model, batches, graph=True, **settings), scored(model, batches, **settings)
    assert same(graphed, expected) and graphed.provenance["stop"] == expected.provenance["stop"]
    assert find_plop_targets(model, batches, types=2, graph=True, progress=False, **settings) == find_plop_targets(
        model, batches, types=2, progress=False, **settings
    )


def test_a_layer_left_out_is_left_out_in_replays(graphing: torch.device) -> None:
    class Flat(Plain):
        """Its head sees other rows than tokens, and not one per sample."""

        def forward(self, x: Tensor, **ignored: Any) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x.flatten(0, 1)[:5])

    model = Flat().to(graphing)
    settings = {"include": ["up", "down", "head"]}
    batches = floats(4)
    graphed, expected = scored(model, batches, graph=True, **settings), scored(model, batches, **settings)
    assert same(graphed, expected)
    assert [item.reason for item in graphed.unscored] == [item.reason for item in expected.unscored] != []


def test_provenance_survives_a_file(graphing: torch.device, tmp_path: Path) -> None:
    model, batches = model_on("llama", graphing), [plain(2, 24, i) for i in range(3)]
    assert scored(model, batches).provenance["graph"] is None
    scored(model, batches, graph=True).save(tmp_path / "s.json")
    loaded = Scores.load(tmp_path / "s.json")
    assert dict(loaded.provenance["graph"]) == {"captured": 1, "replayed": 2, "reason": None}


@pytest.mark.filterwarnings("ignore:.*no CUDA device")
def test_without_a_cuda_device_it_is_refused(llama: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        InputError, match="`graph` needs the model on a CUDA device, and it is on cpu; move it there, or"
    ):
        scored(llama, [plain(2, 24, 0)], graph=True)
    assert main(["score", "plop-tiny", "arithmetic", "--graph", "--device", "cpu", "--quiet"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("plop: `--graph` needs the model on a CUDA")


def test_the_command_graphs(graphing: torch.device, tmp_path: Path) -> None:
    output = tmp_path / "s.json"
    arguments = ["score", "plop-tiny", "arithmetic", "--device", graphing.type, "--samples", "24", "--quiet"]
    graph = ["--graph", "--pad-to-multiple-of", "64", "--max-length", "64"]
    assert main([*arguments, *graph, "-o", str(output)]) == 0
    provenance = Scores.load(output).provenance
    # Two batches of samples that were cut, and the last one, which ends in three that are shorter.
    assert dict(provenance["graph"]) == {"captured": 1, "replayed": 1, "reason": None}
    assert provenance["data"]["pad_to_multiple_of"] == 64


def test_weights_on_several_devices_are_scored_eagerly(graphing: torch.device) -> None:
    model = Plain().to(graphing)
    model.head.register_parameter("elsewhere", nn.Parameter(torch.empty(1, device="meta")))
    with Collector(model, discover(model).layers) as collector, torch.no_grad():
        with pytest.warns(UserWarning, match=rf"the weights are on several devices \({graphing.type}.*, meta\)"):
            graphed = GraphedForwards(model, lambda model, batch: model(batch["x"]), collector)
        with graphed:
            for batch in floats(3):
                graphed.run(batch, 2, None)
        assert collector.totals().shape == (4, 6, 5) and graphed.report()["graph"]["replayed"] == 0


def test_a_foreign_object_in_a_batch_is_said_so(graphing: torch.device) -> None:
    model = Plain().to(graphing)
    batches = [{**batch, "cache": object()} for batch in floats(3)]
    report = scored(model, batches, graph=True).provenance["graph"]
    assert report == {"captured": 0, "replayed": 0, "reason": "a batch holds a object, which may stand for anything"}


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
    with pytest.warns(UserWarning, match=rf"because it is not known how transformers [\d.]+ .* no `{name}`"):
        graphed = scored(model, batches, graph=True)
    assert graphed.provenance["graph"]["captured"] == 0 and f"no `{name}`" in graphed.provenance["graph"]["reason"]
    assert same(graphed, expected)
