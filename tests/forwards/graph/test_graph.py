"""`score(graph=True)`: bitwise identical to an eager run, from forwards that are captured once and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
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
from plop_ext.scoring.targets import find_plop_target_modules
from plop_ext.streams.batch import BatchStreams
from tests.support.architectures import ARCHITECTURES
from tests.support.graphed import Batch, floats, model_on, padded, plain, same, scored
from tests.support.tiny_models import Plain

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 16 counted tokens", "ignore:.*expert projections")


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
def test_scores_are_bitwise_identical(name: str, case: str, graphing: torch.device) -> None:
    model, (batches, settings, captured, replayed) = model_on(name, graphing), CASES[case]
    before = [{key: value.clone() for key, value in batch.items()} for batch in batches]
    graphed = scored(model, batches, graph=True, **settings)
    assert graphed.provenance["graph"] == {"captured": captured, "replayed": replayed, "reason": None}
    assert same(graphed, scored(model, batches, **settings))
    assert all(torch.equal(batch[key], copy[key]) for batch, copy in zip(batches, before, strict=True) for key in copy)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*synchronizes with the device", "ignore:.*not scored", "ignore:.*input of zeros")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_bitwise_identical_captured_or_not(name: str) -> None:
    case = ARCHITECTURES[name]
    model, batches = case.build().cuda(), [case.batch() for _ in range(3)]
    graphed = scored(model, batches, graph=True, **case.kwargs)
    assert same(graphed, scored(model, batches, **case.kwargs))
    report = graphed.provenance["graph"]
    assert report["replayed"] == 2 or "synchronizes with the device" in report["reason"]


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
    assert (report["captured"], report["replayed"]) == (0, 0) and "no batch had the shapes" in report["reason"]
    assert same(graphed, scored(model, batches))


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


def test_what_is_forgotten_is_tried_eagerly_again(graphing: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `forget` the next batch of a kind runs eagerly, whether its like was tried or captured."""
    tried: list[int] = []
    try_eagerly = GraphedForwards._try_eagerly
    model, batches = Plain().to(graphing), floats(8)

    def noted(self: GraphedForwards, *args: Any) -> None:
        tried.append(current)
        try_eagerly(self, *args)

    monkeypatch.setattr(GraphedForwards, "_try_eagerly", noted)
    with Collector(model, discover(model).layers) as collector, torch.no_grad():
        with GraphedForwards(model, lambda model, batch: model(batch["x"]), collector) as graphed:
            for current, batch in enumerate(batches):
                if current in (1, 4):
                    graphed.forget()
                graphed.run(batch, BatchStreams.of_mask(2, None))
            assert graphed.report()["graph"] == {"captured": 2, "replayed": 5, "reason": None}
        totals = collector.recording.queue.all()
    assert tried == [0, 1, 4]
    with Collector(model, discover(model).layers) as collector, torch.no_grad():
        for batch in batches:
            collector.begin(2, None)
            model(batch["x"].to(graphing))
            collector.end()
        assert torch.equal(totals, collector.recording.queue.all())


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
    """Scores are bitwise identical in both cases, so a run may continue without graphs, or with them."""
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
    assert find_plop_target_modules(
        model, batches, types=2, graph=True, progress=False, **settings
    ) == find_plop_target_modules(model, batches, types=2, progress=False, **settings)


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
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("plop: `--graph` needs a CUDA device")


def test_the_command_graphs(graphing: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plop_ext.cli.options._check_graph", lambda args: None)  # `graphing` may be a stand-in
    output = tmp_path / "s.json"
    arguments = ["score", "plop-tiny", "arithmetic", "--device", graphing.type, "--samples", "24", "--quiet"]
    graph = ["--graph", "--pad-to-multiple-of", "64", "--max-length", "64"]
    assert main([*arguments, *graph, "-o", str(output)]) == 0
    provenance = Scores.load(output).provenance
    # Two batches of samples that were cut, and the last one, which ends in three that are shorter.
    assert dict(provenance["graph"]) == {"captured": 1, "replayed": 1, "reason": None}
    assert provenance["data"]["pad_to_multiple_of"] == 64
