"""What `score` passes to its parts, and records of them. Values of scores: test_score; refusals: test_input."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plop_ext.errors import InputError
from plop_ext.provenance import describe_model
from plop_ext.scores import Scores
from plop_ext.scoring import baseline as baseline_module
from plop_ext.scoring import score as score_module
from plop_ext.scoring import targets as targets_module
from plop_ext.scoring.digest import data_hash, digest
from plop_ext.scoring.score import score
from plop_ext.scoring.targets import find_plop_target_modules
from plop_ext.statistics import StopRule
from tests.support.architectures import ARCHITECTURES
from tests.support.tiny_models import Plain

NAMES = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
DEFAULTS = {
    "mask": "attention",
    "baseline": "frobenius",
    "probes": None,
    "include": None,
    "exclude": (),
    "scope": "language",
    "max_samples": 128,
    "token_step": 1,
    "seed": 0,
    "compat": None,
}
CHANGED = {
    "mask": "all",
    "baseline": "probe",
    "probes": 4,
    "include": ("up", "down"),
    "exclude": ("layers.0.up",),
    "scope": "all",
    "max_samples": 5,
    "token_step": 2,
    "seed": 7,
    "compat": None,
}


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 32, 16, generator=generator) for size in sizes]


def whole(model: nn.Module, data: Any, **settings: Any) -> Scores:
    return score(model, data, **{"stop": None, "progress": False, **settings})


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of `discover_whole`, `Collector` and `choose_forwards`, which are called all the same."""
    seen: dict[str, Any] = {}

    def spy(name: str) -> None:
        called = getattr(score_module, name)

        def keep(*arguments: Any, **named: Any) -> Any:
            seen[name] = (arguments, named)
            if name == "choose_forwards":
                named = dict.fromkeys(named, False)
            return called(*arguments, **named)

        monkeypatch.setattr(score_module, name, keep)

    for name in ("discover_whole", "Collector", "choose_forwards"):
        spy(name)
    return seen


def test_the_settings_are_recorded() -> None:
    assert score(Plain(), batches(2), progress=False).provenance["settings"] == DEFAULTS
    probed = score(Plain(), batches(2), baseline="probe", progress=False).provenance["settings"]
    assert probed == {**DEFAULTS, "baseline": "probe", "probes": 256}
    assert whole(Plain(), batches(2), **CHANGED).provenance["settings"] == CHANGED


def test_the_settings_reach_the_parts(passed: dict[str, Any]) -> None:
    model = Plain()
    scores = whole(model, batches(2, 2, 2, 2), **CHANGED)
    assert scores.module_names == tuple(NAMES[1:]) and len(scores.sample_ids) == 6
    assert {module.baseline_from for module in scores.modules} == {"probe"}
    names = {"include": ("up", "down"), "exclude": ("layers.0.up",), "scope": "all", "everything": False}
    assert passed["discover_whole"] == ((model, None), names)
    (collected, layers), named = passed["Collector"]
    assert collected is model and [layer.name for layer in layers] == NAMES[1:] and named == {"last_call_only": False}


@pytest.mark.parametrize("ways", [{}, {"fast": True}, {"graph": True}], ids=str)
def test_the_ways_to_run_a_forward_are_passed_on(passed: dict[str, Any], ways: dict[str, bool]) -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return model(2 * batch)

    model, data = Plain(), batches(2)
    scores = whole(model, data, forward=forward, **ways)
    (chosen, chosen_forward, collector), named = passed["choose_forwards"]
    assert chosen is model and chosen_forward is forward and collector.recording.queue is not None
    assert named == {"fast": False, "graph": False, **ways}
    assert scores.totals.values.tobytes() == whole(model, [2 * data[0]]).totals.values.tobytes()


def test_the_published_script_scores_heads_and_the_last_call_only(passed: dict[str, Any]) -> None:
    scores = score(Plain(), batches(2), compat="paper-script", progress=False)
    assert scores.provenance["stop"] is None
    assert scores.module_names == (*NAMES, "head") and scores.paper_script
    assert passed["discover_whole"][1]["everything"] is True and passed["Collector"][1] == {"last_call_only": True}
    with pytest.raises(InputError) as caught:
        whole(Plain(), batches(2), compat="paper-script", fast=True)
    assert str(caught.value) == (
        "`fast` reads outputs together, and `compat`='paper-script' reads each separately; leave one of the two out"
    )


def test_a_compiled_model_is_scored_eagerly() -> None:
    class Compiled(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

    model = Plain()
    assert whole(Compiled(model), batches(2)).module_names == tuple(NAMES)


def test_modes_and_random_states_are_restored() -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def forward(model: nn.Module, batch: Tensor) -> None:
        assert not model.training and not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(1)
        model(batch)

    model, before = Plain().train(), states()
    whole(model, batches(2), forward=forward)
    assert model.training and model.layers[0].up.training and states() == before


class Shuffled(list[Tensor]):
    """Data with a random order of its own."""

    def in_random_order(self, seed: int) -> list[Tensor]:
        assert seed == 7
        return self[::-1]


def test_data_are_read_in_random_order_if_the_run_may_stop_early() -> None:
    data = Shuffled(batches(1, 3, 2))
    assert whole(Plain(), data, seed=7).sample_batches.tolist() == [0, 1, 1, 1, 2, 2]
    early = whole(Plain(), data, seed=7, stop=StopRule(min_samples=100))
    assert early.sample_batches.tolist() == [0, 0, 1, 1, 1, 2]
    listed = whole(Plain(), list(data), seed=7, stop=StopRule(min_samples=100))
    assert listed.sample_batches.tolist() == [0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(("limit", "available"), [(None, 3), (2, 2)])
def test_what_a_stop_rule_was_given_is_recorded(limit: int | None, available: int) -> None:
    scores = whole(Plain(), batches(1, 2, 2), max_samples=limit, stop=StopRule(types=1, min_samples=2, confidence=0.6))
    stop = scores.provenance["stop"]
    # The number of batches times the samples of the first.
    assert stop["samples"] == len(scores.sample_ids) == 3 and stop["available"] == available
    assert stop["types"] == 1 and stop["confidence"] == 0.6 and stop["stability"] is not None
    assert whole(Plain(), batches(1)).provenance["stop"] is None


def test_the_stop_rule_uses_the_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("plop_ext.scoring.stopping.set_stability", lambda table, rule: seen.append(table) or 1.0)
    scores = whole(Plain(), batches(2, 2, 2), stop=StopRule(min_samples=4))
    assert len(scores.sample_ids) == 4 and seen[0].baseline.tolist() == scores.baseline.tolist()


def test_data_and_model_are_described() -> None:
    model, data = Plain(), batches(2, 1)
    found = whole(model, data, data_name="toy", data_info={"split": "test"}).provenance
    expected = data_hash([digest(batch) for batch in data])
    assert found["data"] == {"split": "test", "name": "toy", "hash": expected, "samples": 3}
    assert found["model"] == describe_model(model) and found["model"]["class"] == "Plain"
    assert found["fast"] is None and found["graph"] is None and 0 < found["seconds"] < 60
    assert found["backend"] in ("native-cpu", "pytorch")


def test_the_journal_knows_the_run(tmp_path: Path) -> None:
    path, model, data = tmp_path / "run.partial", Plain(), batches(2, 1)
    rule = StopRule(min_samples=100)
    scores = whole(model, data, stop=rule, data_name="toy", journal=path)
    header, *records, _ = path.read_text().split("\n")
    assert json.loads(header)["run"] == {
        "model": describe_model(model),
        "data": "toy",
        **DEFAULTS,
        "exclude": [],
        "stop": str(rule),
        "fast": False,
        "modules": NAMES,
    }
    assert json.loads(header)["baseline"] == scores.baseline.tolist() and len(records) == 2
    with pytest.raises(InputError, match="belongs to an interrupted run"):
        whole(model, data, stop=rule, data_name="toy", journal=path)
    again = whole(model, data, stop=rule, data_name="toy", journal=path, resume=True, forward=lambda m, b: 1 / 0)
    assert again.totals.values.tobytes() == scores.totals.values.tobytes()


@pytest.mark.parametrize(
    ("limit", "total", "advanced"), [(None, 2, [1, 1]), (10, 10, [2, 1]), ("auto", 128, [2, 1])], ids=str
)
@pytest.mark.parametrize("shown", [{}, {"progress": True}, {"progress": False}], ids=str)
def test_progress(
    monkeypatch: pytest.MonkeyPatch, limit: Any, total: int, advanced: list[int], shown: dict[str, bool]
) -> None:
    bars: list[Any] = []

    @contextmanager
    def bar(*arguments: Any) -> Iterator[Any]:
        bars.append(arguments)
        yield bars.append

    monkeypatch.setattr(score_module, "progress_bar", bar)
    monkeypatch.setattr(baseline_module, "progress_bar", bar)
    score(Plain(), batches(2, 1), max_samples=limit, stop=None, baseline="probe", **shown)
    wanted = shown.get("progress", True)
    phases = [("reading weights", 4, wanted), ("probing", 4, wanted)]
    assert bars == [phases[0], *[1] * 4, phases[1], *[1] * 4, ("scoring", total, wanted), *advanced]


def test_problems_are_warned_of_and_the_run_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "plop_ext.scoring.score")
    with pytest.warns(UserWarning, match="2 of 2 samples have fewer than 16 counted tokens"):
        scores = whole(Plain(), [batches(2)[0][:, :15]])
    assert caplog.messages == [f"scored 4 modules on 2 samples, backend {scores.provenance['backend']}"]


SETTLED = {"stop": StopRule(types=2)}


@pytest.mark.parametrize(
    ("types", "given", "expected"),
    [
        (2, {}, SETTLED),
        (2, {"max_samples": "auto"}, SETTLED),
        (2, {"stop": "auto"}, SETTLED),
        (2, {"stop": "settled", "max_samples": 9}, SETTLED),
        (np.int64(2), {}, SETTLED),
        (1, {"mask": "all"}, {"stop": StopRule(types=1), "mask": "all"}),
        (2, {"max_samples": 9}, {}),
        (2, {"max_samples": None, "stop": "auto"}, {}),
        (2, {"compat": "paper-script"}, {}),
        (2, {"stop": None}, {}),
        (2, {"stop": StopRule(types=5)}, {}),
        (2, {"stop": "soon"}, {}),
        ("auto", {}, {}),
        (None, {}, {}),
        (0, {}, {}),
    ],
    ids=str,
)
def test_targets_stop_once_the_types_asked_for_are_settled(
    monkeypatch: pytest.MonkeyPatch, types: Any, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    calls: list[Any] = []

    class Placed:
        notes = ()

        def place(self, types: Any, **others: Any) -> Placed:
            assert set(others.values()) == {None}
            calls.append(types)
            return self

        def targets(self) -> str:
            return "targets"

    monkeypatch.setattr(
        targets_module, "score", lambda *arguments, **named: calls.append((arguments, named)) or Placed()
    )
    model, data = Plain(), batches(1)
    assert find_plop_target_modules(model, data, types, **given) == "targets"
    assert calls == [((model, data), {"progress": True, **given, **expected}), types]


def test_target_modules_follow_the_conventions_of_peft() -> None:
    model = ARCHITECTURES["phi3"].build()
    batch = ARCHITECTURES["phi3"].batch()
    with pytest.warns(UserWarning, match="PEFT adapts whole weights"):
        found = find_plop_target_modules(
            model, [batch], ["qkv_proj.q"], show_progress=False, max_samples=None, stop=None
        )
    assert set(found) == {"target_modules", "target_parameters"} and found["target_parameters"] is None
    with pytest.raises(InputError, match="`typos` is no argument of `find_plop_target_modules`"):
        find_plop_target_modules(model, [batch], typos=3)


@pytest.mark.filterwarnings("ignore")
def test_target_modules_keep_their_ranks() -> None:
    architecture = ARCHITECTURES["llama"]
    found = find_plop_target_modules(
        architecture.build(), [architecture.batch()], 2, ranks="inverse-nfn", max_params=3000, show_progress=False
    )
    names = {name for key in found["rank_pattern"] for name in key.replace("\\", "").split("|")}
    assert names == set(found["target_modules"])
    assert all(found["alpha_pattern"][key] == 2 * rank for key, rank in found["rank_pattern"].items())
