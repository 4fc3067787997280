"""Figures that follow from the modules and totals of a run."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from plop_ext.errors import InputError
from plop_ext.lora_target import LoraTarget
from plop_ext.placement import Placement
from plop_ext.placement.budget import Budget
from plop_ext.placement.cost import Cost
from plop_ext.placement.data import PlacementData
from plop_ext.placement.fingerprint import Fingerprint
from plop_ext.score_data import FewTokenModules, SampleScores, ScoreData, ScoredModule, TypeScore, paper_script
from plop_ext.score_data.frozen import FrozenDict, freeze
from plop_ext.score_data.modules import FEW_ROUTED, few_routed_detail
from plop_ext.score_data.samples import token_moments
from plop_ext.score_data.settings import Settings
from plop_ext.score_data.types import members_by_type, score_types
from plop_ext.scores import Scores
from plop_ext.totals import Totals
from plop_ext.unscored import UnscoredModule
from tests.support.gain_tables import scores, table
from tests.support.scored_modules import scored_module
from tests.support.totals import make_totals

MODULES = (
    scored_module("layers.0.attn.q_proj", "q_proj", 0, 4, 8, 0.5, 2.0),
    scored_module("layers.0.mlp.up_proj", "up_proj", 0, 4, 16, 1.5, 6.0),
    scored_module("layers.1.attn.q_proj", "q_proj", 1, 4, 8, 2.0, 4.0),
)


def data(compat: str | None = None, provenance: dict[str, Any] | None = None) -> ScoreData:
    """Three modules on three samples in two batches; the second sample is of other data."""
    totals = make_totals(
        3,
        3,
        sum_gain=[[4.0, 2.0, 6.0], [3.0, 9.0, 3.0], [0.0, 8.0, 4.0]],
        sum_gain_sq=[[8.0, 4.0, 20.0], [9.0, 30.0, 9.0], [0.0, 40.0, 16.0]],
        tokens=[[2.0, 1.0, 2.0], [1.0, 3.0, 1.0], [0.0, 2.0, 1.0]],
        skipped_zero=[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
    )
    parts = [{"name": "code", "samples": 1}, {"name": None, "samples": 2}]
    made = {"settings": {"compat": compat}, "data": {"name": "code", "samples": 3, "parts": parts}}
    return ScoreData(MODULES, totals, np.array([5, 7, 9]), np.array([0, 0, 1]), (), provenance or made)


def test_a_facade_and_its_data_give_the_same_figures() -> None:
    found = scores(table([0.5, 2.0]))
    plain = ScoreData(**{name: getattr(found, name) for name in ScoreData.__dataclass_fields__})
    assert isinstance(found, Scores) and not hasattr(plain, "place")
    assert plain.by_type() == found.by_type() and (plain.nfn == found.nfn).all()


def test_types_with_their_extremes_and_families() -> None:
    up, q = data().by_type()
    # Gains 12 / 5, 15 / 5 and 12 / 3 over the baselines.
    assert (q.type, q.modules, q.family) == ("q_proj", 2, "attention")
    assert (up.type, up.modules, up.family) == ("up_proj", 1, "mlp")
    assert (q.nfn, q.lowest, q.highest) == pytest.approx(((4.8 + 2.0) / 2, 2.0, 4.8))
    assert (up.nfn, up.lowest, up.highest) == (2.0, 2.0, 2.0)
    assert data().types == ("up_proj", "q_proj") and data().tokens == 5


def test_a_module_is_an_ordinary_linear_layer_unless_said() -> None:
    assert (MODULES[0].kind, MODULES[0].baseline_from) == ("linear", "weight")


def test_members_keep_the_models_order_and_types_are_sorted_by_nfn_then_label() -> None:
    assert members_by_type(MODULES, range(3)) == {"q_proj": [0, 2], "up_proj": [1]}
    assert members_by_type(MODULES, [1, 2]) == {"up_proj": [1], "q_proj": [2]}
    members = {"b": [0], "a": [1, 2], "c": [2]}
    found = score_types(MODULES, np.array([1.0, 3.0, 2.0]), members, {"b": 1.0, "a": 1.0, "c": 0.5})
    assert [score.type for score in found] == ["c", "a", "b"]
    assert [(score.lowest, score.highest) for score in found] == [(2.0, 2.0), (2.0, 3.0), (1.0, 1.0)]


def test_per_sample_figures() -> None:
    with np.errstate(all="raise"):
        found = data().per_sample()
    assert found.ids.tolist() == [5, 7, 9] and found.data == ("code", None, None)
    assert found.modules == tuple(module.name for module in MODULES) and found.types == ("up_proj", "q_proj")
    assert found.tokens.tolist() == [[2, 1, 2], [1, 3, 1], [0, 2, 1]] and found.tokens.dtype == np.int64
    np.testing.assert_allclose(found.nfn, [[4.0, 4.0, 6.0], [2.0, 2.0, 2.0], [np.nan, 2.0, 2.0]])
    np.testing.assert_allclose(found.nfn_std, [[0.0, 0.0, 2.0], [0.0, 1 / 1.5, 0.0], [np.nan, 1.0, 0.0]], atol=1e-12)
    np.testing.assert_allclose(found.type_nfn, [[2.0, 2.0, 2.0], [4.0, 3.0, 4.0]])


def test_rounding_makes_no_negative_variance() -> None:
    mean, std = token_moments(make_totals(1, 1, sum_gain=3.0, sum_gain_sq=3.0 - 1e-12, tokens=3.0), np.array([1.0]))
    assert mean.tolist() == [[1.0]] and std.tolist() == [[0.0]]


def test_data_without_parts_is_one_part() -> None:
    settings = {"settings": {"compat": None}}
    assert data(provenance={**settings, "data": {"name": "toy"}}).sample_data == ("toy",) * 3
    assert data(provenance={**settings, "data": {}}).sample_data == (None,) * 3
    assert data(provenance=settings).sample_data == (None,) * 3


@pytest.mark.parametrize("k", [0, -1, 3])
def test_a_cut_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=f"^`k` must be between 1 and 2, the number of types, got {k}$"):
        scores(table([0.5, 2.0])).statistics(k=k)
    assert [scores(table([0.5, 2.0])).statistics(k=k).k for k in (1, 2)] == [1, 2]


def test_the_seed_of_statistics_is_passed_on() -> None:
    found = scores(table([0.5, 0.6, 2.0], sample_sd=0.5))
    first = found.statistics().to_dict()
    assert first == found.statistics(seed=0).to_dict() != found.statistics(seed=1).to_dict()


def test_the_scripts_gain_is_a_mean_of_batch_means_in_which_zero_inputs_count() -> None:
    found = data("paper-script")
    # Batches 0 and 1: 6 / 4 and 6 / 2; 12 / 4 and 3; 8 / 2 and 4 / 2.
    assert found.gain.tolist() == [(1.5 + 3.0) / 2, (3.0 + 3.0) / 2, (4.0 + 2.0) / 2]
    assert found.paper_script and not data().paper_script
    message = 'scores with compat="paper-script" have no statistics; score without compat'
    with pytest.raises(InputError, match=f"^{message}$"):
        found.table  # noqa: B018


def test_a_batch_that_calls_no_module_has_no_part_in_the_scripts_mean() -> None:
    totals = make_totals(1, 4, sum_gain=[[4.0, 2.0, 7.0, 0.0]], tokens=[[1.0, 1.0, 2.0, 0.0]])
    assert paper_script.gain(totals, np.array([0, 1, 1, 2])).tolist() == [(4.0 + 3.0) / 2]


def test_the_scripts_types_are_ratios_of_sums_scaled_by_rms() -> None:
    up, q = data("paper-script").by_type()
    rms = np.array([2.0, 4.0]) / 32**0.5
    expected = (np.array([2.25, 3.0]) / rms).sum() / (np.array([0.5, 2.0]) / rms).sum()
    assert (q.type, q.modules) == ("q_proj", 2) and q.nfn == pytest.approx(expected) and expected > 2.4
    assert (up.type, up.modules) == ("up_proj", 1) and up.nfn == pytest.approx(2.0)


def test_the_scripts_groups_are_substrings() -> None:
    names = ["a.q_proj", "a.qk_proj", "b.k_proj.q_proj", "c.dense"]
    assert paper_script.groups(names) == {"q_proj": [0, 2], "k_proj": [1, 2]}
    assert paper_script.PAPER_GROUPS == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")


def test_the_scripts_metrics() -> None:
    found = paper_script.metrics(MODULES[1:2], np.array([3.0]))
    rms = 6.0 / 64**0.5
    assert found == {"layers.0.mlp.up_proj": pytest.approx({"actual": 3.0 / rms / 4, "random": 1.5 / rms / 4})}
    with pytest.raises(ValueError, match="shorter"):
        paper_script.metrics(MODULES, np.array([3.0]))


def test_frozen_data_is_read_only_to_its_leaves() -> None:
    given: dict[str, Any] = {"a": {"b": [1, {"c": 2}]}, "t": (1, [2])}
    found = freeze(given)
    given["a"]["b"].append(3)
    assert found == {"a": {"b": (1, {"c": 2})}, "t": (1, (2,))} and type(found["a"]["b"][1]) is FrozenDict
    changes: list[Callable[[Any], Any]] = [
        lambda x: x.__setitem__("a", 1),
        lambda x: x.__delitem__("a"),
        lambda x: x.__ior__({"a": 1}),
        lambda x: x.clear(),
        lambda x: x.pop("a"),
        lambda x: x.popitem(),
        lambda x: x.setdefault("z", 1),
        lambda x: x.update(a=1),
    ]
    for change in changes:
        with pytest.raises(TypeError, match=r"^this is read-only; change a copy, `dict\(\.\.\.\)`$"):
            change(found)
    for twin in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert twin == found and type(twin) is FrozenDict and json.dumps(twin) == json.dumps(found)


@pytest.mark.parametrize(
    "record",
    [
        *(Budget, Cost, Fingerprint, LoraTarget, Placement, PlacementData),
        *(FewTokenModules, SampleScores, ScoreData, ScoredModule, Scores, Settings, Totals, TypeScore, UnscoredModule),
    ],
)
def test_results_cannot_be_changed(record: Any) -> None:
    assert record.__dataclass_params__.frozen


@pytest.mark.parametrize("record", [FewTokenModules, SampleScores, ScoreData, Scores, Totals])
def test_results_with_arrays_are_equal_to_themselves_only(record: Any) -> None:
    assert not record.__dataclass_params__.eq


def test_modules_with_too_few_tokens_say_how_many() -> None:
    assert few_routed_detail(7.0) == "7 of at least 16" and FEW_ROUTED == "too few tokens were routed to it"
    assert FewTokenModules(MODULES[:1], make_totals(1, 2), (3,)).positions == (3,)
