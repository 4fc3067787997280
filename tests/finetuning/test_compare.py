"""Comparing placements: equal parameters, tuned rates, paired differences, and the file they are kept in."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from plop_ext.data import Encoded, encode, load_rows
from plop_ext.errors import InputError
from plop_ext.finetuning import compare as compare_module
from plop_ext.finetuning.compare import compare
from plop_ext.finetuning.comparison import Comparison, ComparisonRow
from plop_ext.finetuning.evaluation import held_out_loss
from plop_ext.finetuning.finetune import FinetuneResult
from plop_ext.placement import Placement
from plop_ext.scores import Scores
from tests.support.tiny_lm import byte_tokenizer, placement, tiny_llama

TOKENIZER = byte_tokenizer()
RATES = (1e-3, 4e-3, 2e-2)


class FakeScores:
    """Scores of the tiny model without a scoring run: v_proj lowest, then q_proj."""

    provenance = {"model": {"class": "LlamaForCausalLM", "name": "tiny"}}  # noqa: RUF012

    def place(self, types: int | None = None, *, strategy: str = "lowest") -> Placement:
        model = tiny_llama()
        chosen = {"lowest": ("v_proj", "q_proj"), "inverse": ("down_proj",), "all": ()}[strategy]
        return placement(model, *chosen, strategy=strategy)


SCORES = cast(Scores, FakeScores())


@pytest.fixture(scope="module")
def train() -> list[Encoded]:
    return encode(load_rows("arithmetic", max_samples=30), TOKENIZER, max_length=128)


@pytest.fixture(scope="module")
def held_out() -> list[Encoded]:
    return encode(load_rows("arithmetic", split="test", max_samples=6), TOKENIZER, max_length=128)


class Recorder:
    """Stands in for `finetune`: keeps what it was asked for, and answers from a table of losses."""

    def __init__(self, losses: dict[tuple[str, float], float] | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.losses = losses or {}

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        train: Sequence[Encoded],
        eval: Sequence[Encoded],
        placement: Placement,
        **options: Any,
    ) -> FinetuneResult:
        self.calls.append({"train": train, "eval": eval, "label": placement.label, **options})
        rate, seed = options["learning_rate"], options["seed"]
        loss = self.losses.get((placement.label, rate), 2.0) + 0.1 * seed * seed
        return FinetuneResult(
            loss_before=3.0 if options["loss_before"] is None else options["loss_before"],
            loss_after=loss,
            trainable_params=placement.num_parameters(options["r"]),
            r=options["r"],
            learning_rate=rate,
            seed=seed,
            steps=options["max_steps"],
            seconds=options["max_steps"] * (1.0 + seed),
            history=(),
            diverged=math.isnan(loss),
        )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    stub = Recorder()
    monkeypatch.setattr(compare_module, "finetune", stub)
    return stub


def quick(train: list[Encoded], held_out: list[Encoded], **options: Any) -> Comparison:
    return compare(
        tiny_llama(),
        TOKENIZER,
        SCORES,
        train,
        held_out,
        **({"learning_rates": RATES, "max_steps": 5, "progress": False} | options),
    )


def test_end_to_end(train: list[Encoded], held_out: list[Encoded], tmp_path: Path) -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[ComparisonRow] = []
    result = compare(
        model,
        TOKENIZER,
        SCORES,
        train,
        held_out,
        [placement(model, "down_proj")],
        r=8,
        learning_rates=(1e-3, 2e-2),
        seeds=(0, 1),
        max_steps=4,
        batch_size=4,
        progress=False,
        on_result=seen.append,
    )
    assert [row.label for row in result.rows] == ["down_proj", "all-linear"]
    assert [row.label for row in seen] == ["all-linear", "down_proj"] and set(seen) == set(result.rows)
    assert result.loss_before == pytest.approx(held_out_loss(model, held_out, pad_token_id=0), rel=1e-6)
    for row in result.rows:
        assert row.loss_mean < result.loss_before and row.seconds_per_step > 0 and row.diverged == 0
    first, everything = result.rows
    assert first.differences == tuple(a - b for a, b in zip(first.losses, everything.losses, strict=True))
    assert everything.differences == (0.0, 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == result


class TestMatching:
    def test_ranks_fit_the_first_placement_at_r(
        self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder
    ) -> None:
        chosen = [placement(tiny_llama(), "q_proj"), placement(tiny_llama(), "down_proj")]
        result = quick(train, held_out, placements=chosen, r=16)
        # q_proj: 2 modules of 32 x 32; down_proj: 2 of 48 x 32; everything: 2 blocks of 464 a rank.
        assert result.max_params == 16 * 2 * 64
        assert [(row.r, row.params) for row in result.rows] == [(16, 2048), (12, 1920), (2, 1856)]
        assert result.mismatch == (2048 - 1856) / 2048
        assert {(call["r"], call["lora_alpha"]) for call in recorder.calls} == {(16, 32), (12, 24), (2, 4)}

    def test_budget_is_kept(self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder) -> None:
        result = quick(train, held_out, max_params=3000, alpha_over_r=1)
        assert result.max_params == 3000 and all(2000 < row.params <= 3000 for row in result.rows)
        assert all(call["lora_alpha"] == call["r"] for call in recorder.calls)

    def test_budget_too_small_is_said_before_any_run(
        self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder
    ) -> None:
        with pytest.raises(InputError, match="`max_params`=900 is too small for `all-linear`: rank 1 has 928"):
            quick(train, held_out, max_params=900)
        assert not recorder.calls


class TestReference:
    def test_default_placements(self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder) -> None:
        result = quick(train, held_out)
        assert [row.strategy for row in result.rows] == ["lowest", "inverse", "all"]
        assert {call["label"] for call in recorder.calls[:6]} == {"all-linear"}

    def test_is_not_added_twice(self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder) -> None:
        chosen = [placement(tiny_llama(), strategy="types"), placement(tiny_llama(), "q_proj")]
        result = quick(train, held_out, placements=chosen, max_params=2000)
        assert [row.label for row in result.rows] == ["all-linear", "q_proj"]
        assert result.rows[0].differences == (0.0, 0.0, 0.0)

    def test_differences_are_paired(self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder) -> None:
        recorder.losses = {("down_proj", 4e-3): 1.5, ("all-linear", 4e-3): 1.75}
        result = quick(train, held_out, placements=[placement(tiny_llama(), "down_proj")], seeds=(1, 2, 3))
        row, everything = result.rows
        assert row.losses == pytest.approx((1.6, 1.9, 2.4)) and everything.losses == pytest.approx((1.85, 2.15, 2.65))
        assert row.differences == pytest.approx((-0.25, -0.25, -0.25))
        assert row.difference_mean == pytest.approx(-0.25) and row.difference_std == pytest.approx(0, abs=1e-12)
        assert row.loss_std == pytest.approx(statistics.stdev((1.6, 1.9, 2.4)))
        assert row.seconds_per_step == 3.0  # the median of 2, 3 and 4


class TestTuning:
    def test_never_touches_the_held_out_set(
        self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder
    ) -> None:
        result = quick(train, held_out, validation=0.2)
        every = [tuple(sample["input_ids"]) for sample in train]
        tuning = [call for call in recorder.calls if call["eval"] != held_out]
        final = [call for call in recorder.calls if call["eval"] == held_out]
        assert len(tuning) == len(final) == 9
        for call in tuning:
            fitted, judged = ([tuple(sample["input_ids"]) for sample in call[part]] for part in ("train", "eval"))
            assert len(judged) == 6 and sorted(fitted + judged) == sorted(every) and not set(fitted) & set(judged)
            assert call["seed"] == 0 and call["learning_rate"] in RATES
        assert all(call["train"] == train for call in final)
        assert result.settings["validation_samples"] == 6 and result.settings["train_samples"] == 30

    def test_each_placement_gets_its_own_rate(
        self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder
    ) -> None:
        recorder.losses = {("v_proj+q_proj", 4e-3): 1.0, ("down_proj", 2e-2): 1.0, ("all-linear", 1e-3): 1.0}
        result = quick(train, held_out, learning_rates=(2e-2, 1e-3, 4e-3))
        assert [(row.learning_rate, row.lr_at_edge) for row in result.rows] == [
            (4e-3, False),
            (2e-2, True),
            (1e-3, True),
        ]
        assert result.rows[0].tuning == ((1e-3, 2.0), (4e-3, 1.0), (2e-2, 2.0)) and result.learning_rates == RATES
        final = {
            (call["label"], call["learning_rate"], call["seed"]) for call in recorder.calls if call["eval"] == held_out
        }
        assert final == {(row.label, row.learning_rate, seed) for row in result.rows for seed in (0, 1, 2)}

    def test_diverged_rates_lose(self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder) -> None:
        label = "all-linear"
        recorder.losses = {(label, 1e-3): 2.5, (label, 4e-3): math.nan, (label, 2e-2): math.nan}
        row = quick(train, held_out, placements=[placement(tiny_llama())]).rows[0]
        assert row.learning_rate == 1e-3 and row.diverged == 0 and math.isnan(row.tuning[1][1])

    def test_nothing_but_divergence(
        self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder, tmp_path: Path
    ) -> None:
        recorder.losses = {("all-linear", rate): math.nan for rate in RATES}
        result = quick(train, held_out, placements=[placement(tiny_llama())])
        [row] = result.rows
        assert row.learning_rate == 1e-3 and row.lr_at_edge and row.diverged == 3 and math.isnan(row.loss_mean)
        result.save(tmp_path / "c.json")
        content = json.loads((tmp_path / "c.json").read_text(), parse_constant=lambda name: pytest.fail(name))
        assert content["rows"][0]["losses"] == [None] * 3 and content["rows"][0]["loss_mean"] is None
        assert all(map(math.isnan, Comparison.load(tmp_path / "c.json").rows[0].losses))

    def test_one_rate_and_one_seed(self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder) -> None:
        [row] = quick(train, held_out, placements=[placement(tiny_llama())], learning_rates=[1e-3], seeds=[7]).rows
        assert row.lr_at_edge and math.isnan(row.loss_std) and len(recorder.calls) == 2

    def test_held_out_loss_is_measured_once(
        self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder
    ) -> None:
        quick(train, held_out)
        assert [call["loss_before"] for call in recorder.calls].count(None) == 2  # once for each part

    def test_every_step_and_held_out_batch_moves_the_bar(
        self, train: list[Encoded], held_out: list[Encoded], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        totals, moves = [], []

        @contextmanager
        def bar(description: str, total: int, enabled: bool) -> Iterator[Any]:
            totals.append(total)
            yield lambda steps=1, note="": moves.append(steps)

        monkeypatch.setattr(compare_module, "progress_bar", bar)
        budget: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "eval_batch_size": 2, "seeds": [0]}
        quick(train, held_out, placements=[placement(tiny_llama())], learning_rates=[1e-3], **budget)
        # Two runs of two steps; 3 samples judge and 6 test, each before and after training.
        assert totals == [2 * 2 + 2 * 2 + 2 * 3] and sum(moves) == totals[0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"learning_rates": []}, "`learning_rates` must hold at least one value and none twice"),
            ({"learning_rates": [1e-3, 1e-3]}, "`learning_rates` must hold at least one value and none twice"),
            ({"learning_rates": [1e-3, -1.0]}, "`learning_rates` must be above 0, got -1.0, 0.001"),
            ({"seeds": [0, -1]}, "`seeds` must be at least 0, got -1"),
            ({"r": 0}, "`r` must be at least 1, got 0"),
            ({"max_params": 0}, "`max_params` must be at least 1, got 0"),
            ({"alpha_over_r": 0}, "`alpha_over_r` must be at least 1, got 0"),
            ({"eval_batch_size": 0}, "`eval_batch_size` must be at least 1, got 0"),
            ({"seeds": ()}, "`seeds` must hold at least one value and none twice"),
            ({"validation": 0.0}, "`validation` must be above 0 and below 1, got 0.0"),
            ({"validation": 0.99}, "`train` has 30 samples with a token to predict, too few to split off"),
            ({"placements": []}, "`placements` is empty; give at least one"),
            (
                {"placements": [placement(tiny_llama(), "q_proj"), placement(tiny_llama(), "q_proj")]},
                "`placements` holds the same modules twice, as q_proj and q_proj; remove one",
            ),
        ],
    )
    def test_arguments(
        self, train: list[Encoded], held_out: list[Encoded], recorder: Recorder, options: dict[str, Any], match: str
    ) -> None:
        with pytest.raises(InputError, match=match):
            quick(train, held_out, **options)
        assert not recorder.calls

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            (None, "cannot read `.*`: .*; name a file written by `plop compare`"),
            ("{", "is not JSON; name a file written by `plop compare`"),
            ('{"format": "plop_ext.scores"}', r"is not a plop_ext\.comparison file but plop_ext\.scores"),
            ('{"format": "plop_ext.comparison", "version": 99}', r"has version 99 of plop_ext\.comparison"),
            ('{"format": "plop_ext.comparison", "version": 1}', "is a damaged comparison; write it again"),
        ],
    )
    def test_files(self, tmp_path: Path, text: str | None, match: str) -> None:
        if text is not None:
            (tmp_path / "c.json").write_text(text)
        with pytest.raises(InputError, match=match):
            Comparison.load(tmp_path / "c.json")
