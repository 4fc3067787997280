"""Which modules are scored by their totals, and the reason for each that is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from plop_ext.errors import InputError
from plop_ext.layers import Discovery, LinearLayer
from plop_ext.lora_target import LoraTarget
from plop_ext.score_data import ScoredModule
from plop_ext.scores import Scores
from plop_ext.scoring.assemble import assemble
from plop_ext.scoring.outcome import Outcome
from plop_ext.unscored import UnscoredModule
from tests.support.found_layers import Dequantized, expert, found_layer, run_outcome
from tests.support.totals import make_totals

FEW = "too few tokens were routed to it"


def assembled(
    layers: Sequence[LinearLayer], outcome: Outcome, *, baseline: str = "frobenius", step: int = 1
) -> Scores:
    settings = {"baseline": baseline, "token_step": step, "compat": None}
    elsewhere = UnscoredModule("head", "Linear", "outside the repeated blocks", wanted=False)
    return assemble(Discovery(tuple(layers), (elsewhere,)), outcome, {"settings": settings, "data": {"name": "toy"}})


def test_the_numbers_of_a_run_become_scores() -> None:
    layers = [found_layer("0.up", layer=4), found_layer("0.down", Dequantized(), layer=None)]
    totals = make_totals(2, 2, tokens=[[3, 1], [2, 2]], sum_gain=[[6, 1], [8, 4]])
    outcome = run_outcome(
        totals,
        baselines=[0.5, 2.0],
        norms=[7.0, math.nan],
        ids=np.int32([5, 3]),
        batches=np.int32([0, 1]),
        failures={"other": "why"},
    )
    scores = assembled(layers, outcome)
    assert scores.modules == (
        ScoredModule("0.up", "up", 4, 3, 2, 0.5, 7.0, LoraTarget.of_module("0.up", 3, 2)),
        ScoredModule(
            "0.down", "down", None, 3, 2, 2.0, None, LoraTarget.of_module("0.down", 3, 2), "4-bit", "dequantized"
        ),
    )
    assert scores.nfn.tolist() == [7 / 4 / 0.5, 12 / 4 / 2.0]
    assert scores.totals.values.tobytes() == totals.values.tobytes()
    assert scores.sample_ids.tolist() == [5, 3] and scores.sample_batches.tolist() == [0, 1]
    assert scores.sample_ids.dtype == scores.sample_batches.dtype == np.int64
    assert [item.name for item in scores.unscored] == ["head"] and scores.few_tokens is None
    assert scores.provenance["data"] == {"name": "toy"}


def test_probes_need_no_weight_that_can_be_read() -> None:
    outcome = run_outcome(
        make_totals(2, 1, tokens=1, sum_gain=1),
        baselines=[2.0, math.nan],
        norms=[math.nan] * 2,
        failures={"a": "?", "b": "!"},
    )
    scores = assembled([found_layer("a"), found_layer("b")], outcome, baseline="probe")
    (module,) = scores.modules
    assert module.name == "a" and module.baseline_from == "probe" and module.weight_norm is None
    assert scores.unscored[1] == UnscoredModule("b", "Linear", "!")


@pytest.mark.parametrize(
    ("sums", "changes", "reason"),
    [
        ({"tokens": 9}, {"unassigned": {"bad": "7 rows"}, "failures": {"bad": "no"}}, "7 rows"),
        ({"tokens": 9}, {"failures": {"bad": "its weight cannot be read"}}, "its weight cannot be read"),
        ({}, {}, "never called in the forward, or only with masked tokens"),
        ({}, {"failures": {"bad": "no"}}, "no"),
        ({"skipped_zero": 3}, {}, "no usable token: 3 zero inputs, 0 non-finite"),
        ({"skipped_zero": 1, "skipped_nonfinite": 2}, {}, "no usable token: 1 zero inputs, 2 non-finite"),
        ({"tokens": 9}, {"baselines": [1, 0, 1]}, "its weight is all zero or not finite (baseline 0)"),
        ({"tokens": 9}, {"baselines": [1, math.nan, 1]}, "its weight is all zero or not finite (baseline nan)"),
        ({"tokens": 9}, {"baselines": [1, math.inf, 1]}, "its weight is all zero or not finite (baseline inf)"),
    ],
    ids=str,
)
def test_why_a_module_has_no_score(sums: dict[str, float], changes: dict[str, Any], reason: str) -> None:
    totals = make_totals(3, 1, **{"tokens": [[1], [0], [1]], **{k: [[1], [v], [1]] for k, v in sums.items()}})
    scores = assembled([found_layer(name) for name in ("a", "bad", "b")], run_outcome(totals, **changes))
    assert scores.module_names == ("a", "b") and scores.totals.tokens.tolist() == [[1], [1]]
    assert scores.unscored[1:] == (UnscoredModule("bad", "Linear", reason),) and scores.few_tokens is None


def test_experts_with_fewer_than_16_tokens_are_kept_for_a_merge() -> None:
    names = ["e.0", "a", "e.1", "e.2", "lost", "e.3", "e.4"]
    layers = [found_layer(name) if name in ("a", "lost") else expert(name) for name in names]
    tokens = [[8, 7], [1, 1], [8, 8], [0, 0], [0, 0], [1, 0], [0, 2]]
    scores = assembled(layers, run_outcome(make_totals(7, 2, tokens=tokens), baselines=[1, 1, 1, 1, 1, 0, math.inf]))
    assert scores.module_names == ("a", "e.1")
    assert scores.totals.tokens.tolist() == [[1, 1], [8, 8]]
    assert scores.unscored[1:] == (
        UnscoredModule("e.0", "Linear", FEW, "15 of at least 16"),
        UnscoredModule("e.2", "Linear", FEW, "0 of at least 16"),
        UnscoredModule("lost", "Linear", "never called in the forward, or only with masked tokens"),
        UnscoredModule("e.3", "Linear", FEW, "1 of at least 16"),
        UnscoredModule("e.4", "Linear", FEW, "2 of at least 16"),
    )
    few = scores.few_tokens
    assert few is not None and [module.name for module in few.modules] == ["e.0", "e.2"]
    assert {module.kind for module in few.modules} == {"stacked experts"}
    # Without a baseline, an expert cannot be scored after a merge either.
    assert few.positions == (0, 3) and few.totals.tokens.tolist() == [[8, 7], [0, 0]]


def test_a_reason_known_before_the_forward_counts_more_than_few_tokens() -> None:
    outcome = run_outcome(make_totals(2, 1, tokens=1), failures={"e": "cannot be read"})
    scores = assembled([expert("e"), found_layer("a")], outcome)
    assert scores.unscored[1] == UnscoredModule("e", "Linear", "cannot be read") and scores.few_tokens is None


@pytest.mark.parametrize(
    ("step", "sums", "unassigned", "message"),
    [
        (
            1,
            {},
            {},
            "no token counts: every token of `dataloader` is masked, or no linear layer was called; check "
            "`attention_mask`, `labels` and `mask`",
        ),
        (
            2,
            {},
            {},
            "no token counts: `token_step`=2 reads one token in 2, and none of these counts; lower "
            "`token_step`, or check `attention_mask`, `labels` and `mask`",
        ),
        (1, {}, {"b": "7 rows"}, "no module could be scored; `b`: 7 rows"),
        (2, {"skipped_zero": 2}, {}, "no module could be scored; `b`: no usable token: 2 zero inputs, 0 non-finite"),
    ],
    ids=["masked", "token_step", "unassigned", "zeros"],
)
def test_no_module_with_a_score_is_an_error(
    step: int, sums: dict[str, float], unassigned: dict[str, str], message: str
) -> None:
    outcome = run_outcome(make_totals(2, 1, **sums), unassigned=unassigned)
    with pytest.raises(InputError) as caught:
        assembled([found_layer("a"), found_layer("b")], outcome, step=step)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("stream", "message"),
    [("vision", "no image reaches .* pass `pixel_values`"), ("audio", "no sound reaches .* pass `input_features`")],
)
def test_a_run_over_batches_without_images_says_so(stream: str, message: str) -> None:
    layers = [replace(found_layer(name), stream=stream) for name in "ab"]
    with pytest.raises(InputError, match=message):
        assembled(layers, run_outcome(make_totals(2, 1)))


@pytest.mark.parametrize("missing", ["baselines", "norms"])
def test_numbers_of_other_layers_are_refused(missing: str) -> None:
    outcome = run_outcome(make_totals(2, 1, tokens=1), **{missing: [1.0]})
    with pytest.raises(ValueError, match="zip"):
        assembled([found_layer("a"), found_layer("b")], outcome)


def test_matrices_that_peft_cannot_adapt_compete_if_nothing_else_is_scored() -> None:
    lost = replace(LoraTarget.of_module("0.up", 3, 2), refused="PEFT loses it")
    refused = replace(found_layer("0.up", layer=0), target=lost, no_place="PEFT loses it")
    silent = found_layer("0.down", layer=0)
    totals = make_totals(2, 1, tokens=[[3], [0]], sum_gain=[[6], [0]])
    (scored,) = assembled([refused, silent], run_outcome(totals)).modules
    assert scored.name == "0.up" and not scored.no_place
    gate = replace(found_layer("0.gate", layer=0), no_place="it is a gate")
    with pytest.raises(InputError, match=r"`0\.gate` is none, because it is a gate"):
        assembled([gate, silent], run_outcome(totals))
