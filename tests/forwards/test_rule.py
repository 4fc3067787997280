"""`fast="auto"` and `graph="auto"`: chosen by a rule without a clock, recorded, and kept by a resumed run."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plop_ext.errors import InputError
from plop_ext.forwards import rule
from plop_ext.forwards.rule import GraphRule, Planned, choose
from plop_ext.scores import Scores
from tests.support.fast_models import make, needs_native
from tests.support.graphed import model_on, plain, same, scored
from tests.support.tiny_models import Plain, llama

BATCHES = [plain(2, 24, i) for i in range(12)]
AUTO: dict[str, Any] = {
    "fast": "auto",
    "graph": "auto",
    "exact": False,
    "plain": True,
    "may_stop": False,
    "planned": Planned(),
}


@pytest.fixture
def suitable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every model count as one that the rule was measured on, with blocks of 3e6 weights."""
    monkeypatch.setattr(rule, "_block_weights", lambda model: (3_000_000, None))


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Plain, "no blocks of a supported family"),
        (llama, "there is no kernel for heads of 8"),
        (partial(make, "qwen3"), "not on a CUDA device"),
        (partial(make, "gemma2", torch.bfloat16), "not on a CUDA device"),
    ],
    ids=["no family", "no kernel", "qwen3", "gemma2"],
)
def test_other_models_and_devices_run_eager_hooks(build: Any, why: str) -> None:
    way = choose(build(), **AUTO)
    assert (way.fast, way.graph, way.why) == (False, False, why)


@pytest.mark.usefixtures("suitable")
@pytest.mark.parametrize(
    ("asked", "fast", "graph"),
    [
        ({}, True, True),
        ({"exact": True}, False, True),
        ({"fast": False}, False, True),
        ({"graph": False}, True, False),
        ({"fast": True, "graph": False}, True, False),
        ({"fast": False, "graph": True}, False, True),
        ({"plain": False}, True, False),
        ({"may_stop": True}, False, False),
        ({"may_stop": True, "fast": True}, True, False),
        ({"exact": True, "graph": False}, False, False),
    ],
    ids=str,
)
def test_what_is_asked_for_comes_before_the_rule(asked: dict[str, Any], fast: bool, graph: bool) -> None:
    way = choose(llama(), **{**AUTO, **asked})
    assert way.fast is fast and bool(way.graph) is graph
    assert isinstance(way.graph, GraphRule) == (graph and asked.get("graph", "auto") == "auto")
    for name in ("fast", "graph"):
        assert (f"`{name}` was given" in way.why) == (name in asked)
    assert ("`exact` gives" in way.why) == ("exact" in asked)
    assert way == choose(llama(), **{**AUTO, **asked})


@pytest.mark.usefixtures("suitable")
def test_short_batches_are_captured_early_if_many_are_planned() -> None:
    way = choose(llama(), **{**AUTO, "planned": Planned(batches=100, samples=64)})
    assert isinstance(way.graph, GraphRule) and way.graph.tokens == 100_000
    assert way.graph.admits({"input_ids": torch.zeros(10, 10_000)}) and way.graph.admits(torch.zeros(10, 10_000))
    assert not way.graph.admits({"input_ids": torch.zeros(10, 10_001)}) and not way.graph.admits({"x": torch.ones(1)})
    assert [way.graph.occurrence(size) for size in (1, 8, 9)] == [2, 2, 2]
    assert [way.graph.occurrence(size) for size in (10, 64)] == [4, 4]
    assert GraphRule(1, Planned()).occurrence(1) == 4 and GraphRule(1, Planned(batches=8)).occurrence(1) == 2


@pytest.mark.usefixtures("suitable")
@pytest.mark.parametrize(("count", "replayed"), [(12, 11), (8, 7), (7, 4), (3, 0)])
def test_a_chosen_graph_changes_no_bit(count: int, replayed: int, graphing: torch.device) -> None:
    model, data = model_on("llama", graphing), BATCHES[:count]
    found = scored(model, data, fast=False)
    graph = found.provenance["graph"]
    assert (graph["captured"], graph["replayed"]) == (int(replayed > 0), replayed)
    assert found.provenance["forward"]["graph"] == (replayed > 0) and found.provenance["forward"]["hooks"]
    assert same(found, scored(model, data, fast=False, graph=False))


@pytest.mark.usefixtures("suitable")
def test_a_run_that_may_stop_early_takes_eager_hooks(graphing: torch.device) -> None:
    found = scored(model_on("llama", graphing), BATCHES, stop="settled")
    way = {"hooks": True, "fast": False, "graph": False, "why": "the run may stop early"}
    assert found.provenance["forward"] == way and found.provenance["graph"] is None


@pytest.mark.usefixtures("suitable")
def test_long_batches_run_eagerly_without_a_warning(graphing: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "_MULTIPLICATIONS", 3e6 * 20)
    model = model_on("llama", graphing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scored(model, BATCHES, fast=False)
    reason = "batches of more than 20 tokens run eagerly"
    assert found.provenance["graph"] == {"captured": 0, "replayed": 0, "reason": reason}
    assert not found.provenance["forward"]["graph"]
    assert same(found, scored(model, BATCHES, fast=False, graph=False))


@pytest.mark.usefixtures("suitable")
def test_a_forward_that_cannot_be_captured_is_no_cause_for_a_warning_unless_asked_for(
    graphing: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, work: Any) -> Any:
        raise RuntimeError("no capture")

    model = model_on("llama", graphing)
    expected = scored(model, BATCHES, fast=False, graph=False)
    monkeypatch.setattr("plop_ext.forwards.graph.capture.Recorder.record", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scored(model, BATCHES, fast=False)
    assert "cannot be captured (RuntimeError: no capture)" in found.provenance["graph"]["reason"] and same(
        found, expected
    )
    with pytest.warns(UserWarning, match="batches are scored eagerly, because the forward cannot be captured"):
        scored(model, BATCHES, fast=False, graph=True)


@pytest.mark.usefixtures("suitable")
def test_a_model_that_the_kernels_do_not_suit_is_no_cause_for_a_warning_unless_asked_for() -> None:
    model = Plain()
    data = [torch.randn(2, 32, 16)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scored(model, data, graph=False)
    assert found.provenance["fast"]["reason"] and found.provenance["forward"]["hooks"]
    with pytest.warns(UserWarning, match="`fast=True` has no effect"):
        scored(model, data, fast=True)


@needs_native
@pytest.mark.usefixtures("suitable")
def test_a_resumed_run_keeps_the_choice_of_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, journal = make("llama"), tmp_path / "journal"
    first = scored(model, BATCHES, graph=False, journal=journal)
    assert first.provenance["forward"]["fast"]
    monkeypatch.undo()
    assert not choose(model, **AUTO).fast
    again = scored(model, BATCHES, journal=journal, resume=True)
    assert same(again, first)
    more = [*BATCHES, plain(2, 24, 99)]
    resumed = scored(model, more, journal=journal, resume=True)
    assert resumed.provenance["forward"]["fast"] and "`fast` was given" in resumed.provenance["forward"]["why"]
    assert same(resumed, scored(model, more, fast=True))
    for other in ({"exact": True}, {"fast": False}):
        with pytest.raises(InputError, match="its fast is True, now it is False"):
            scored(model, BATCHES, journal=journal, resume=True, **other)


def test_what_is_no_journal_is_reported_as_ever(tmp_path: Path) -> None:
    for content in (b"", b"{", b"[]\n", b'{"run": 3}\n', b'{"run": {"fast": "x"}}\n'):
        (tmp_path / "journal").write_bytes(content)
        if content in (b"", b"{"):  # killed while the header was written
            scored(Plain(), [torch.randn(2, 32, 16)], journal=tmp_path / "journal", resume=True)
            continue
        with pytest.raises(InputError, match="is no journal of a scoring run"):
            scored(Plain(), [torch.randn(2, 32, 16)], journal=tmp_path / "journal", resume=True)


@needs_native
def test_merging_notes_mixed_ways() -> None:
    model = make("llama")
    parts = [
        scored(model, BATCHES[:2], fast=False, data_name="a"),
        scored(model, BATCHES[2:4], fast=True, data_name="b"),
    ]
    merged = Scores.merge(parts)
    ways = ({"hooks": True, "fast": False, "graph": False}, {"hooks": False, "fast": True, "graph": False})
    assert merged.provenance["forward"] == {"mixed": ways}
    alike = Scores.merge([parts[0], scored(model, BATCHES[4:6], fast=False, data_name="c")])
    assert alike.provenance["forward"] == parts[0].provenance["forward"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fast": "yes"}, r"`fast` must be True, False or 'auto', got 'yes'"),
        ({"graph": None}, r"`graph` must be True, False or 'auto', got None"),
        ({"fast": 1}, r"`fast` must be True, False or 'auto', got 1"),
        ({"exact": "auto"}, r"`exact` must be True or False"),
        (
            {"fast": True, "exact": True},
            r"`fast` changes the last bits, which `exact` keeps; leave one of the two out",
        ),
    ],
    ids=str,
)
def test_other_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scored(Plain(), [torch.randn(2, 32, 16)], **options)


@pytest.fixture(scope="module")
def large() -> nn.Module:
    """Two blocks of 17 million weights: the rule holds for it on a GPU."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "head_dim": 128}
    return make("llama", torch.bfloat16, "cuda", **shape, num_attention_heads=8, num_key_value_heads=8)


@pytest.mark.gpu
def test_on_a_gpu_short_batches_take_fused_kernels_and_graphs(large: nn.Module) -> None:
    found = scored(large, BATCHES)
    assert found.provenance["forward"]["fast"] and found.provenance["forward"]["graph"]
    graph = found.provenance["graph"]
    assert graph["captured"] == 1 and graph["replayed"] >= 10 and graph["reason"] is None
    assert same(found, scored(large, BATCHES)) and same(found, scored(large, BATCHES, fast=True, graph=False))


@pytest.mark.gpu
def test_on_a_gpu_exact_scores_are_those_of_eager_hooks(large: nn.Module) -> None:
    found = scored(large, BATCHES, exact=True)
    assert found.provenance["forward"]["hooks"] and found.provenance["forward"]["graph"]
    assert same(found, scored(large, BATCHES, fast=False, graph=False))


@pytest.mark.gpu
def test_on_a_gpu_a_run_of_two_batches_captures_nothing(large: nn.Module) -> None:
    found = scored(large, BATCHES[:2])
    assert found.provenance["graph"]["captured"] == 0 and found.provenance["forward"]["fast"]


@pytest.mark.gpu
def test_on_a_gpu_float32_keeps_eager_hooks() -> None:
    assert choose(make("llama", device="cuda"), **AUTO).why == "weights of other types than float16 and bfloat16"
