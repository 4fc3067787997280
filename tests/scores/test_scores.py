"""`Scores`: figures derived from the totals, and choosing where LoRA goes."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest

from plop_ext import InputError, Scores
from plop_ext.scores import scores as facade
from tests.support.made_scores import TOTALS, made
from tests.support.totals import make_totals


def test_gain_and_nfn_are_means_over_tokens() -> None:
    scores = made()
    assert scores.gain.tolist() == [8 / 4, 12 / 6, 3 / 1]
    assert scores.baseline.tolist() == [0.5, 2.0, 1.5]
    assert scores.nfn.tolist() == [4.0, 1.0, 2.0]
    assert scores.tokens == 6
    assert scores.module_names == ("layers.0.q_proj", "layers.1.q_proj", "layers.0.up_proj")


def test_a_types_nfn_is_the_mean_of_its_modules_lowest_first() -> None:
    up, q = made().by_type()
    assert (up.type, up.nfn, up.modules, up.lowest, up.highest, up.family) == ("up_proj", 2.0, 1, 2.0, 2.0, "mlp")
    assert (q.type, q.nfn, q.modules, q.lowest, q.highest, q.family) == ("q_proj", 2.5, 2, 1.0, 4.0, "attention")
    assert made().types == ("up_proj", "q_proj")


def test_equal_types_are_ordered_by_name() -> None:
    totals = make_totals(3, 2, sum_gain=1, tokens=1)
    modules = tuple(replace(module, baseline=1.0) for module in made().modules)
    assert made(totals=totals, modules=modules).types == ("q_proj", "up_proj")


def test_scores_are_read_only() -> None:
    scores = made()
    for array in (scores.totals.values, scores.totals.tokens, scores.sample_ids, scores.sample_batches):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        scores.totals = TOTALS  # type: ignore[misc]


def test_the_provenance_is_read_only_and_a_copy() -> None:
    given = {"settings": {"compat": None, "include": ["up"]}, "model": {"class": "Made"}, "data": {"name": None}}
    scores = made(provenance=given)
    given["settings"]["compat"] = "paper-script"
    for change in (
        lambda: scores.provenance["settings"].update(compat="paper-script"),
        lambda: scores.provenance["settings"].__setitem__("compat", "paper-script"),
        lambda: scores.provenance.pop("settings"),  # type: ignore[attr-defined]
    ):
        with pytest.raises(TypeError, match="read-only"):
            change()
    assert scores.gain.tolist() == [8 / 4, 12 / 6, 3 / 1]
    for twin in (copy.deepcopy(scores), pickle.loads(pickle.dumps(scores))):
        assert twin.provenance == scores.provenance and json.loads(json.dumps(twin.provenance))


def test_the_scripts_scale_needs_the_weight_norms() -> None:
    message = "the weight norm of `layers.0.up_proj` is unknown; the published script's scale needs it"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        made("paper-script").paper_metrics()
    known = made(modules=tuple(replace(module, weight_norm=2.0) for module in made().modules))
    rms = 2.0 / (4 * 8) ** 0.5
    assert known.paper_metrics()["layers.0.q_proj"] == pytest.approx({"actual": 2 / rms / 4, "random": 0.5 / rms / 4})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"types": ["q_proj"], "strategy": "inverse", "seed": 7, "r": 4, "ranks": "inverse-nfn"},
        {"modules": 0.5, "max_params": 100},
        {"max_nfn": 0.9, "max_memory": 0.1, "batch": 2, "seq": 64},
    ],
)
def test_place_chooses_from_the_scores_by_its_arguments(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def select(scores: Scores, **given: Any) -> str:
        seen.update(given, scores=scores)
        return "placement"

    monkeypatch.setattr(facade, "select", select)
    scores = made()
    assert scores.place(**changes) == "placement"  # type: ignore[comparison-overlap]
    assert seen.pop("scores") is scores
    nothing = dict.fromkeys(("types", "modules", "max_nfn", "r", "ranks", "max_params", "max_memory", "serve"))
    defaults = {"strategy": "lowest", "seed": 0, "batch": 8, "seq": 1024, "ignore_nonfinite": False}
    assert seen == {**nothing, **defaults, **changes}
