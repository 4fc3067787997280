"""Every warning about the result of a run, word by word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from plop_ext.score_data.modules import FEW_ROUTED
from plop_ext.scores import Scores
from plop_ext.scoring.warn_about import warn_about
from plop_ext.unscored import UnscoredModule
from tests.support.found_layers import run_outcome
from tests.support.scored_modules import scored_module
from tests.support.totals import make_totals

SETTINGS = {"token_step": 1, "compat": None, "mask": "attention"}


def warned(
    recwarn: pytest.WarningsRecorder,
    *,
    unscored: Sequence[UnscoredModule] = (),
    settings: dict[str, Any] | None = None,
    fast: dict[str, Any] | None = None,
    experts: int = 0,
    **fields: Any,
) -> list[str]:
    """What is said of a run over two modules, `a` and `b`, and three samples of 16 tokens unless `fields` differ."""
    totals = make_totals(2, 3, **{"tokens": 16.0, **fields})
    modules = [scored_module(name, "up", 0, 4, 4) for name in "ab"]
    modules[:experts] = [replace(module, kind="stacked experts") for module in modules[:experts]]
    provenance = {"settings": {**SETTINGS, **(settings or {})}, **({} if fast is None else {"fast": fast})}
    scores = Scores(tuple(modules), totals, np.arange(3), np.zeros(3, np.int64), tuple(unscored), provenance)
    warn_about(scores, run_outcome(totals), asked_fast=True)
    assert all(item.category is UserWarning for item in recwarn)
    return [str(item.message) for item in recwarn]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"fast": {"reason": None, "blocks": 0}},
        {"settings": {"token_step": 4}, "tokens": [[4, 4, 4], [0, 1, 2]]},
        {"settings": {"compat": "paper-script"}, "skipped_zero": 3},
        {"unscored": [UnscoredModule("head", "Linear", "outside the repeated blocks", wanted=False)]},
        {"tokens": [[16, 0, 16], [0, 16, 0]]},
    ],
    ids=["nothing", "fast", "token_step", "paper script", "unwanted", "one module each"],
)
def test_nothing_is_said_without_a_cause(recwarn: pytest.WarningsRecorder, arguments: dict[str, Any]) -> None:
    assert warned(recwarn, **arguments) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fast": {"reason": "eager masks", "blocks": 0}}, "`fast=True` has no effect: eager masks"),
        ({"fast": {"reason": "eager masks", "blocks": 3}}, "`fast=True` speeds up 3 blocks: eager masks"),
        (
            {"settings": {"token_step": 2}, "tokens": [[8, 0, 0], [8, 0, 8]]},
            "`token_step`=2 read no token of 1 of 3 samples, because they have few counted tokens; lower `token_step`",
        ),
        (
            {"tokens": [[16, 0, 15], [16, 0, 3]]},
            "2 of 3 samples have fewer than 16 counted tokens; use longer samples, or more of them",
        ),
        (
            {"skipped_nonfinite": [[0, 2, 0], [3, 0, 1]]},
            "6 token features are NaN or infinite and were excluded, most in `b` (4)",
        ),
        (
            {"skipped_zero": [[1, 2, 2], [3, 0, 1]]},
            "9 token features have an input of zeros and were excluded, most in `a` (5)",
        ),
        (
            {"experts": 2, "unscored": [UnscoredModule("e", "Experts", FEW_ROUTED, "3 of at least 16")] * 2},
            "2 expert projections of 4 are not scored: fewer than 16 tokens of 3 samples were routed to each; use "
            "more samples",
        ),
        (
            {"unscored": [UnscoredModule(name, "Odd", f"reason {name}") for name in "xyz"]},
            "not scored: `x` (Odd), `y` (Odd), `z` (Odd): reason x",
        ),
        (
            {"unscored": [UnscoredModule(name, "Odd", f"reason {name}") for name in "wxyz"]},
            "not scored: `w` (Odd), `x` (Odd), `y` (Odd) and 1 more: reason w",
        ),
    ],
    ids=["fast", "some fast", "unread", "short", "non-finite", "zero", "experts", "3 missing", "4 missing"],
)
def test_each_warning(recwarn: pytest.WarningsRecorder, arguments: dict[str, Any], message: str) -> None:
    assert warned(recwarn, **arguments) == [message]


def test_samples_of_which_no_token_was_read_are_not_counted_as_short_too(recwarn: pytest.WarningsRecorder) -> None:
    messages = warned(recwarn, settings={"token_step": 4}, tokens=[[0, 3, 4], [0, 3, 4]])
    assert [message.split(" samples")[0] for message in messages] == [
        "`token_step`=4 read no token of 1 of 3",
        "1 of 3",
    ]
