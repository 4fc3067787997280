"""`compare`: equal parameters, rates tuned off the test rows, paired differences, and refusals before any trial."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_ext.data import Encoded, encode, load_rows
from plop_ext.errors import InputError
from plop_ext.experiment import trial as trial_module
from plop_ext.experiment.compare import compare
from plop_ext.experiment.result import Comparison
from plop_ext.finetuning.evaluation import held_out_losses
from plop_ext.placement import Placement
from plop_ext.scores import Scores
from tests.support.stub_trials import StubTrials
from tests.support.tiny_lm import byte_tokenizer, placement, tiny_llama

TOKENIZER = byte_tokenizer()
RATES = (1e-3, 4e-3, 2e-2)


class FakeScores(Scores):
    """Scores of the tiny model without a scoring run: v_proj lowest, then q_proj."""

    def __init__(self) -> None:
        pass

    def place(self, types: Any = None, *, strategy: str = "lowest", **_: Any) -> Placement:
        chosen = {"lowest": ("v_proj", "q_proj"), "inverse": ("down_proj",), "all": ()}[strategy]
        return placement(tiny_llama(), *chosen, strategy=strategy)


SCORES = FakeScores()


@pytest.fixture(scope="module")
def train() -> list[Encoded]:
    return encode(load_rows("arithmetic", max_samples=30), TOKENIZER, max_length=128)


@pytest.fixture(scope="module")
def held_out() -> list[Encoded]:
    return encode(load_rows("arithmetic", split="test", max_samples=6), TOKENIZER, max_length=128)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubTrials]:
    trials = StubTrials()
    monkeypatch.setattr(trial_module, "train_and_measure", trials)
    yield trials


def quick(train: list[Encoded], held_out: list[Encoded], **options: Any) -> Comparison:
    settings = {"learning_rates": RATES, "max_steps": 5, "seeds": (0, 1, 2), "widen": 0, "progress": False}
    return compare(tiny_llama(), TOKENIZER, SCORES, train, held_out, **(settings | options))


def trials_of(stub: StubTrials, held_out: list[Encoded], *, final: bool) -> list[dict[str, Any]]:
    """The calls of trials, without those that measure the time."""
    return [call for call in stub.calls if call["rate"] != 1e-5 and (call["eval"] == held_out) == final]


@pytest.mark.slow
def test_end_to_end(train: list[Encoded], held_out: list[Encoded], tmp_path: Path) -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    result = compare(
        model,
        TOKENIZER,
        SCORES,
        train,
        held_out,
        [placement(model, "down_proj")],
        r=4,
        learning_rates=(1e-3, 2e-2),
        seeds=(0, 1),
        max_steps=3,
        batch_size=4,
        widen=0,
        progress=False,
    )
    assert [row.label for row in result.rows] == ["all-linear", "down_proj"] and result.reference == "all-linear"
    assert result.loss_before == pytest.approx(held_out_losses(model, held_out, pad_token_id=0).mean, rel=1e-12)
    for row in result.rows:
        assert row.loss_mean < result.loss_before and row.seconds_per_step > 0
    everything, other = result.rows
    assert other.difference is not None and everything.difference is None
    assert other.difference.mean == pytest.approx(other.loss_mean - everything.loss_mean, abs=1e-12)
    assert other.difference.low < other.difference.mean < other.difference.high
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    result.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == result


class TestMatching:
    def test_ranks_match_all_linear_at_r(
        self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials
    ) -> None:
        chosen = [placement(tiny_llama(), "up_proj"), placement(tiny_llama(), "down_proj")]
        result = quick(train, held_out, placements=chosen, r=2)
        # A rank: everything 2 blocks of 464, up_proj and down_proj 2 of 48 + 32. The whole numbers nearest to
        # 2, 3 and 4 * 928 / 160 are 3.4 %, 2.3 % and 0.9 % off.
        assert [(row.r, row.params) for row in result.rows] == [(4, 3712), (23, 3680), (23, 3680)]
        assert result.mismatch == 32 / 3712 and result.max_params is None
        assert {(call["r"], call["lora_alpha"]) for call in stub.calls} == {(4, 8), (23, 46)}

    def test_a_rank_over_the_width_is_capped(
        self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials
    ) -> None:
        result = quick(train, held_out, placements=[placement(tiny_llama(), "v_proj")], r=8)
        assert [row.r for row in result.rows] == [8, 16]  # v_proj is 32 x 16
        assert result.mismatch == pytest.approx(1 - 16 * 2 * 48 / (8 * 928))

    def test_budget_is_kept(self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials) -> None:
        result = quick(train, held_out, max_params=3000, alpha_over_r=1)
        assert result.max_params == 3000 and all(1500 < row.params <= 3000 for row in result.rows)
        assert all(call["lora_alpha"] == call["r"] for call in stub.calls)

    def test_budget_too_small_is_said_before_any_trial(
        self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials
    ) -> None:
        with pytest.raises(InputError, match="`max_params`=900 is too small for `all-linear`: rank 1 has 928"):
            quick(train, held_out, max_params=900)
        assert not stub.calls


class TestReference:
    def test_default_placements(self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials) -> None:
        assert [row.strategy for row in quick(train, held_out).rows] == ["all", "lowest", "inverse"]

    def test_is_not_added_twice(self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials) -> None:
        chosen = [placement(tiny_llama(), "q_proj"), placement(tiny_llama(), strategy="types")]
        result = quick(train, held_out, placements=chosen, max_params=2000)
        assert [(row.label, row.strategy) for row in result.rows] == [("all-linear", "types"), ("q_proj", "types")]

    def test_alone(self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials) -> None:
        result = quick(train, held_out, placements=[placement(tiny_llama())])
        assert result.verdict.decision == "alone" and result.verdict.winner == "all-linear"


class TestTuning:
    def test_never_touches_the_test_rows(
        self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials
    ) -> None:
        result = quick(train, held_out, validation=0.2)
        every = sorted(tuple(sample["input_ids"]) for sample in train)
        tuning, final = (trials_of(stub, held_out, final=last) for last in (False, True))
        assert len(tuning) == len(final) == 9
        for call in tuning:
            fitted, judged = ([tuple(sample["input_ids"]) for sample in call[part]] for part in ("train", "eval"))
            assert len(judged) == 6 and sorted(fitted + judged) == every and not set(fitted) & set(judged)
            assert call["seed"] == 0 and call["rate"] in RATES
        assert all(call["train"] == train for call in final)
        assert result.settings["validation_samples"] == 6 and result.settings["train_samples"] == 30

    def test_each_placement_gets_its_own_rate(
        self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials
    ) -> None:
        stub.losses = {("v_proj+q_proj", 4e-3): 1.0, ("down_proj", 2e-2): 1.0, ("all-linear", 1e-3): 1.0}
        result = quick(train, held_out, learning_rates=(2e-2, 1e-3, 4e-3))
        rates = {"all-linear": (1e-3, True), "v_proj+q_proj": (4e-3, False), "down_proj": (2e-2, True)}
        assert {row.label: (row.learning_rate, row.lr_at_edge) for row in result.rows} == rates
        assert result.rows[1].tuning == ((5, 1e-3, 2.0), (5, 4e-3, 1.0), (5, 2e-2, 2.0))
        final = {(call["label"], call["rate"], call["seed"]) for call in trials_of(stub, held_out, final=True)}
        assert final == {(row.label, row.learning_rate, seed) for row in result.rows for seed in (0, 1, 2)}

    def test_equal_rows_are_on_one_side(self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials) -> None:
        quick(train + train[:10], held_out, validation=0.5)
        for call in trials_of(stub, held_out, final=False):
            fitted, judged = ([tuple(sample["input_ids"]) for sample in call[part]] for part in ("train", "eval"))
            assert not set(fitted) & set(judged) and len(judged) == len(set(judged)) == 15

    def test_nothing_but_divergence(
        self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials, tmp_path: Path
    ) -> None:
        stub.losses = {"all-linear": math.nan, "v_proj+q_proj": math.nan, "down_proj": math.nan}
        result = quick(train, held_out)
        assert result.verdict.decision == "diverged" and result.verdict.winner is None
        assert {row.outcome for row in result.rows} == {"diverged"} and not trials_of(stub, held_out, final=True)
        result.save(tmp_path / "c.json")
        content = json.loads((tmp_path / "c.json").read_text(), parse_constant=lambda name: pytest.fail(name))
        assert content["rows"][0]["validation_loss"] is None
        assert Comparison.load(tmp_path / "c.json").rows[0].learning_rate is None

    def test_without_all_linear_the_best_on_validation_is_the_reference(
        self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials
    ) -> None:
        stub.losses = {"all-linear": math.nan, "v_proj+q_proj": 1.5, "down_proj": 1.0}
        stub.row_spread, stub.seed_spread = 0.01, 0.001
        result = quick(train, held_out)
        assert result.reference == result.verdict.winner == "down_proj" and result.verdict.decision == "worse"


class TestHeldOut:
    def test_rows_that_are_trained_on_are_left_out(
        self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials, caplog: pytest.LogCaptureFixture
    ) -> None:
        result = quick(train, held_out + train[:4])
        assert result.settings["test_samples"] == len(held_out)
        assert "4 of 10 samples of `eval` are in the training data too; they are not measured" in caplog.text

    def test_nothing_left_is_refused(self, train: list[Encoded], stub: StubTrials) -> None:
        with pytest.raises(InputError, match="`eval`: each of its 30 samples is in the training data too"):
            quick(train, list(reversed(train)))
        assert not stub.calls


class TestJournal:
    def test_a_second_run_repeats_no_trial(
        self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials, tmp_path: Path
    ) -> None:
        first = quick(train, held_out, journal=tmp_path / "j", max_seconds=1e6)
        calls = len(stub.calls)
        assert quick(train, held_out, journal=tmp_path / "j", max_seconds=1e6, resume=True) == first
        assert len(stub.calls) == calls

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            ({"max_steps": 6}, "its settings: max_steps is 5, now it is 6"),
            ({"max_seconds": 1e6}, "its settings: max_seconds is None, now it is"),
            ({"placements": [placement(tiny_llama(), "q_proj")]}, "of other candidates"),
        ],
    )
    def test_other_inputs_are_refused(
        self,
        train: list[Encoded],
        held_out: list[Encoded],
        stub: StubTrials,
        tmp_path: Path,
        change: dict[str, Any],
        what: str,
    ) -> None:
        quick(train, held_out, journal=tmp_path / "j")
        with pytest.raises(InputError, match=what):
            quick(train, held_out, journal=tmp_path / "j", resume=True, **change)

    def test_other_rows_or_weights_are_refused(
        self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials, tmp_path: Path
    ) -> None:
        quick(train, held_out, journal=tmp_path / "j")
        with pytest.raises(InputError, match="its training data is"):
            quick(train[1:], held_out, journal=tmp_path / "j", resume=True)
        with pytest.raises(InputError, match="its held-out data is"):
            quick(train, held_out[1:], journal=tmp_path / "j", resume=True)
        other = tiny_llama()
        with torch.no_grad():
            other.model.norm.weight[3] += 1
        with pytest.raises(InputError, match="its model: weights is"):
            compare(
                other,
                TOKENIZER,
                SCORES,
                train,
                held_out,
                learning_rates=RATES,
                max_steps=5,
                seeds=(0, 1, 2),
                widen=0,
                progress=False,
                journal=tmp_path / "j",
                resume=True,
            )


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"learning_rates": []}, "`learning_rates` must hold at least one value and none twice"),
            ({"learning_rates": [1e-3, 1e-3]}, "`learning_rates` must hold at least one value and none twice"),
            ({"learning_rates": [1e-3, -1.0]}, "`learning_rates` must be above 0, got -1.0"),
            ({"seeds": [0, -1]}, "`seeds` must be at least 0, got -1"),
            ({"r": 0}, "`r` must be at least 1, got 0"),
            ({"max_params": 0}, "`max_params` must be a whole number \\(24, 10M, 1e9\\), got 0"),
            ({"alpha_over_r": 0}, "`alpha_over_r` must be at least 1, got 0"),
            ({"eval_batch_size": 0}, "`eval_batch_size` must be at least 1, got 0"),
            ({"finalists": 1}, "`finalists` must be at least 2, got 1"),
            ({"widen": -1}, "`widen` must be at least 0, got -1"),
            ({"margin": 0}, "`margin` must be above 0, got 0"),
            ({"seeds": ()}, "`seeds` must hold at least one value and none twice"),
            ({"validation": 0.0}, "`validation` must be above 0 and below 1, got 0.0"),
            ({"validation": 0.99}, "`train` has 30 different samples with a token to predict, too few to split off"),
            ({"max_seconds": 1e-9}, "`max_seconds` is too short: 5 steps a trial take 1 minutes"),
            ({"placements": []}, "`placements` is empty; give at least one"),
            (
                {"placements": [placement(tiny_llama(), "q_proj"), placement(tiny_llama(), "q_proj")]},
                "`placements` holds the same modules twice, as q_proj and q_proj; remove one",
            ),
        ],
    )
    def test_arguments(
        self, train: list[Encoded], held_out: list[Encoded], stub: StubTrials, options: dict[str, Any], match: str
    ) -> None:
        with pytest.raises(InputError, match=match):
            quick(train, held_out, **options)
        assert not trials_of(stub, held_out, final=True)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            (None, "cannot read `.*`: .*; name a file written by `plop compare`"),
            ("{", "is not JSON; name a file written by `plop compare`"),
            ('{"format": "plop_ext.scores"}', r"is not a plop_ext\.comparison file but plop_ext\.scores"),
            ('{"format": "plop_ext.comparison", "version": 99}', r"has version 99 of plop_ext\.comparison"),
            ('{"format": "plop_ext.comparison", "version": 2}', "is a damaged comparison; write it again"),
        ],
    )
    def test_files(self, tmp_path: Path, text: str | None, match: str) -> None:
        if text is not None:
            (tmp_path / "c.json").write_text(text)
        with pytest.raises(InputError, match=match):
            Comparison.load(tmp_path / "c.json")
