"""The variants of a model's forward do the same work, and their runs add up to one result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import masking_utils

from benchmarks import compiled, model_forward, plot_model_forward, variants
from benchmarks.headlines import HEADLINES
from benchmarks.overhead import Case, make_case
from benchmarks.rivals import BestHooks
from benchmarks.shapes import SHAPES, build
from benchmarks.variants import BASE, Ready, Variant
from plop_ext.collecting.totals_queue import TotalsQueue
from plop_ext.forwards import choose
from plop_ext.forwards.graph import capture
from plop_ext.layers import discover
from tests.support.graphed import Repeated

CPU = torch.device("cpu")


@pytest.fixture
def case() -> Case:
    return make_case(build("tiny", {"num_hidden_layers": 3}), SHAPES["tiny"]["vocab_size"], 2, 16, CPU)


def copy_of(case: Case) -> Case:
    model = compiled.shared_copy(case.model)
    return replace(case, model=model, layers=discover(model).layers)


def test_a_shared_copy_has_the_weights_and_no_hooks(case: Case) -> None:
    copied = compiled.shared_copy(case.model)
    pairs = zip(case.model.parameters(), copied.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    seen: list[object] = []
    copied.layers[0].mlp.register_forward_hook(lambda *args: seen.append(args))
    case.forward()
    assert not seen


@pytest.mark.slow
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_hooks_score_as_the_best_hooks_in_one_graph(case: Case, native: bool, whole: bool) -> None:
    best = BestHooks({layer.name: layer.module for layer in case.layers}, case.input_ids.numel(), CPU)
    with best:
        case.forward()
        best.end()
    copied = copy_of(case)
    hooks = compiled.StaticHooks(copied.hookable, copied.forward, case.input_ids.numel(), CPU, native=native)
    # Code compiled without hooks in the same process must not serve the model that has them.
    plain, compiler = copy_of(case), compiled.Compiler()
    for model in (plain.model, copied.model):
        (compiler.whole if whole else compiler.blocks)(model)
    for _ in range(2):
        with compiled.eager_masks():
            plain.forward()
            copied.forward()
        hooks.end()
    assert compiler.graphs == 2
    assert hooks.gains() == pytest.approx(list(best.gains().values()), rel=1e-5)


def test_compiled_forwards_get_the_attention_of_eager_ones(case: Case) -> None:
    masks: list[object] = []
    copied, compiler = copy_of(case), compiled.Compiler()
    copied.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    compiler.whole(copied.model)
    with compiled.eager_masks():
        copied.forward()
    assert masks == [None]


def test_captured_forwards_get_the_attention_of_eager_ones(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[object] = []
    case.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)  # as during a capture
    case.forward()
    with compiled.eager_masks():
        case.forward()
    assert masks[0] is not None and masks[1] is None


def test_the_graphed_forward_is_replayed_on_the_fast_path(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "_require_cuda", lambda case: None)
    monkeypatch.setattr(capture, "Recorder", Repeated)
    monkeypatch.setattr(choose, "check_graph", lambda model: None)
    graphed = next(variant for variant in variants.VARIANTS if variant.name == variants.FAST_GRAPH)
    sent: list[object] = []
    send = TotalsQueue.send
    monkeypatch.setattr(TotalsQueue, "send", lambda self, totals: (sent.append(totals), send(self, totals)))
    with graphed.start(case) as ready:
        before = len(sent)
        ready.candidate.run(None)
        ready.candidate.run(None)
        assert len(sent) == before + 2 and sent[-1] is sent[-2]  # what a replay writes
        assert ready.note() == "3 of 3 blocks on the fast path"


def quick(folder: Path, *arguments: str) -> dict[str, object]:
    output = folder / "model_forward.json"
    model_forward.main(
        ["--device", "cpu", "--output", str(output), "--rounds", "1", "--seconds-per-case", "0", *arguments]
    )
    return json.loads(output.read_text())


def test_runs_add_up_to_one_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(case: Case) -> Ready:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(model_forward, "VARIANTS", (BASE, Variant("plop_ext fast", broken)))
    first = quick(tmp_path, "--model", "tiny", "--case", "1x8", "--case", "2x8")
    assert [(row["batch"], row["candidate"]) for row in first["rows"]] == [
        (batch, name) for batch in (1, 2) for name in ("plain forward", "plop_ext fast", "published script")
    ]
    assert [row["error"] for row in first["rows"] if "error" in row] == ["RuntimeError: first line"] * 2
    both = quick(tmp_path, "--append", "--model", "tiny", "--case", "2x8", "--case", "4x8")
    assert [row["batch"] for row in both["rows"]] == [1] * 3 + [2] * 3 + [4] * 3
    assert both["environment"]["measured"] == [["tiny", 2, 8], ["tiny", 4, 8]]
    assert both["earlier_environments"] == [first["environment"] | {"measured": [["tiny", 1, 8]]}]
    again = quick(tmp_path, "--append", "--model", "tiny", "--case", "1x8")
    assert again["earlier_environments"] == [both["environment"]]  # of the first run no row is left
    assert [row["batch"] for row in again["rows"]] == [1] * 3 + [2] * 3 + [4] * 3
    with pytest.raises(SystemExit, match="2"):
        quick(tmp_path, "--append", "--quick")
    assert "--append: model_forward.json has quick False, this run True" in capsys.readouterr().err


def test_a_long_published_script_is_left_out(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_forward, "PUBLISHED_TOKENS", 31)
    assert "ms" not in model_forward.published_row(case, None)
    monkeypatch.setattr(model_forward, "PUBLISHED_TOKENS", 32)
    assert model_forward.published_row(case, None)["ms"] > 0


def test_the_plot_shows_every_case(tmp_path: Path) -> None:
    row = {"candidate": "plop_ext", "ratio_p20": 1.0, "ratio_p80": 1.1, "tokens": 8}
    rows = [
        {**row, "model": "a", "batch": 1, "ratio": 1.05},
        {**row, "model": "b", "batch": 2, "ratio": 5.0},
        {"candidate": "plop_ext fast", "model": "b", "batch": 2, "tokens": 8, "error": "none"},
    ]
    source, target = tmp_path / "model_forward.json", tmp_path / "model_forward.svg"
    source.write_text(json.dumps({"rows": rows}))
    plot_model_forward.main([str(source), "--output", str(target)])
    text = target.read_text()
    assert all(part in text for part in ("a, 1 x 8", "b, 2 x 8", "5.0 &gt;", "plop_ext"))


def test_the_headlines_are_those_of_the_fast_path() -> None:
    row = {"model": "llama-3.1-8b", "batch": 8, "tokens": 1024}
    rows = [
        {**row, "candidate": "plain forward", "ratio": 1.0, "of_compiled": 1.1},
        {**row, "candidate": "plop_ext fast", "ratio": 0.75, "of_compiled": 0.85},
        {**row, "candidate": "plop_ext fast, CUDA graph", "error": "none"},
    ]
    found = HEADLINES["model_forward"]({"rows": rows, "environment": {"gpu": "a GPU"}})
    assert found == [
        ("plop_ext fast / plain forward, llama-3.1-8b, 8 x 1024", "0.750", "a GPU"),
        ("plop_ext fast / plain forward, compiled, llama-3.1-8b, 8 x 1024", "0.850", "a GPU"),
    ]
