"""What a choice does with ranks, seeds, scores without signal and parts of packed weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from plop_ext.errors import InputError
from plop_ext.lora_target import LoraTarget
from plop_ext.placement.budget import Budget
from plop_ext.placement.cost import Cost
from plop_ext.placement.fingerprint import Fingerprint
from plop_ext.scores import Scores
from tests.support.gain_tables import scores, table


def layer_scores(nfn: Sequence[float]) -> Scores:
    """One layer with a module of each NFN, of equal sizes."""
    return scores(table(nfn, layers=1, sample_sd=0.0))


def packed(found: Scores, parts: dict[str, str]) -> Scores:
    """`found` with the modules of some types as parts of weights, given by type."""
    modules = (
        replace(m, target=LoraTarget.of_module(parts.get(m.type, m.name), m.in_features, m.out_features))
        for m in found.modules
    )
    return replace(found, modules=tuple(modules))


def test_the_cost_at_another_rank_is_that_of_a_placement_with_the_rank() -> None:
    found = layer_scores([0.5, 1.0])
    placement, other = (found.place(types=["a", "b"], r=r) for r in (16, 5))
    assert placement.cost("float32", 2, 8, r=5) == other.cost("float32", 2, 8)
    assert placement.cost("float32", 2, 8, r=5) != placement.cost("float32", 2, 8)


def test_a_number_of_types_without_signal_is_placed_with_a_warning() -> None:
    found = layer_scores([1.0, 1.0, 1.0, 1.0])
    with pytest.warns(UserWarning) as caught:
        found.place(types=2)
    expected = f"no signal: {found.signal.reason}; placed because a number was given"
    assert expected in [str(warning.message) for warning in caught]


@pytest.mark.parametrize("what", [{"modules": 2}, {"types": 2}, {}], ids=str)
def test_a_random_choice_needs_no_signal(what: dict[str, int]) -> None:
    found = layer_scores([1.0, 1.0, 1.0, 1.0])
    assert not found.signal.found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        placement = found.place(strategy="random", **what)
    assert placement.strategy == "random"


def test_ranks_by_equal_scores_have_all_parameters_of_the_single_rank() -> None:
    found = layer_scores([1.0, 1.0, 1.0])
    placement = found.place(strategy="all", r=8, ranks="inverse-nfn")
    assert set(placement.ranks.values()) == {8}
    assert placement.num_parameters() == found.place(strategy="all", r=8).num_parameters()


def test_the_rank_of_a_packed_weight_is_by_its_chosen_parts_only() -> None:
    found = packed(layer_scores([1.0, 2.0, 9.0, 1.0]), {"a": "ac", "c": "ac", "b": "bd", "d": "bd"})
    placement = found.place(types=["a", "b"], r=8, ranks="inverse-nfn")
    # The largest c with floor(c / 1) + floor(c / 2) <= 2 * 8 is just below 12.
    assert placement.ranks == {"ac": 11, "bd": 5}


def test_the_rank_of_a_packed_weight_is_by_the_mean_of_its_chosen_parts() -> None:
    found = packed(layer_scores([1.0, 3.0, 2.0, 9.0]), {"a": "abd", "b": "abd", "d": "abd"})
    placement = found.place(types=["a", "b", "c"], r=8, ranks="inverse-nfn")
    assert placement.ranks == {"abd": 8, "layers.0.c": 8}


def test_automatic_k_falls_back_to_the_budget_at_the_given_rank() -> None:
    tied = scores(table([0.5, 0.501, 0.502, 0.503, 0.504], own_layer_sd=0.1))
    allowed = 4 * tied.place(types=1).num_parameters(8)
    placement = tied.place(types="auto", max_params=allowed, r=8)
    assert len(placement.types) == 4 and placement.r == 8


def test_a_budget_that_drops_one_of_two_types_is_the_reason() -> None:
    found = layer_scores([0.5, 2.0])
    allowed = found.place(types=1).num_parameters(8)
    assert found.place(max_params=allowed).reason == "the budget allows 1 of the 2 lowest types"


def test_ranks_by_score_keep_the_parameters_of_a_given_rank_below_a_larger_budget() -> None:
    found = layer_scores([0.5, 1.0, 2.0, 4.0])
    single = found.place(types=3, r=8)
    placement = found.place(types=3, r=8, ranks="inverse-nfn", max_params=10 * single.num_parameters())
    assert len(set(placement.ranks.values())) > 1
    assert placement.num_parameters() <= single.num_parameters()


def test_a_budget_and_automatic_k_are_both_reasons() -> None:
    tied = scores(table([0.5, 0.501, 0.502, 0.503, 0.504], own_layer_sd=0.1))
    alone = tied.place(types="auto")
    assert alone.reason.startswith("automatic k is ") and len(alone.types) > 1
    allowed = tied.place(types=1).num_parameters(8)
    both = tied.place(types="auto", max_params=allowed)
    assert both.reason.startswith("automatic k is ") and len(both.types) == 1


def test_a_budget_below_a_clear_cut_is_named_after_it() -> None:
    clear = scores(table([0.5, 0.51, 0.52, 2.0, 2.1, 2.2]))
    alone = clear.place(types="auto")
    assert len(alone.types) == 3
    budget = clear.place(types="auto", max_params=clear.place(types=1).num_parameters(8))
    assert budget.reason == f"{alone.reason}; the budget allows 1 of the 3 lowest types"


def test_ranks_by_score_may_use_what_a_budget_leaves_over() -> None:
    found = layer_scores([0.5, 1.0, 2.0, 4.0])
    most = found.place(types=3).num_parameters(9) - 1
    single = found.place(types=3, max_params=most)
    placement = found.place(types=3, max_params=most, ranks="inverse-nfn")
    assert single.num_parameters() == found.place(types=3).num_parameters(8)
    assert single.num_parameters() < placement.num_parameters() <= most


def test_the_only_type_is_placed_by_default() -> None:
    found = layer_scores([0.5])
    assert found.place().types == ("a",)


@pytest.mark.parametrize("strategy", ["attention", "mlp", "all"])
def test_a_strategy_by_kind_takes_no_number(strategy: str) -> None:
    with pytest.raises(InputError, match=f'^`types` has no meaning with strategy="{strategy}"'):
        layer_scores([0.5, 1.0]).place(types=1, strategy=strategy)


def test_refusals_name_the_reason_and_the_remedy() -> None:
    found = layer_scores([1.0, 1.0, 1.0, 1.0])
    with pytest.raises(InputError) as without:
        found.place()
    assert str(without.value) == f"no signal: {found.signal.reason}; give `types` as a number to place anyway"
    found = layer_scores([0.123456, 2.0])
    with pytest.raises(InputError) as low:
        found.place(max_nfn=0.1)
    assert str(low.value) == "`max_nfn`=0.1 selects no module; the lowest NFN is 0.1235"


def test_the_label_of_a_default_random_choice_names_the_seed() -> None:
    placement = layer_scores([1.0, 1.0, 1.0, 1.0]).place(strategy="random", seed=7)
    assert placement.label == "random-3 (seed 7)"


def test_the_label_of_a_random_choice_names_the_seed() -> None:
    placement = layer_scores([1.0, 1.0, 1.0]).place(types=2, strategy="random", seed=7)
    assert placement.label == "random-2 (seed 7)"


@pytest.mark.parametrize(
    "value",
    [Budget(1, None, "float32", 1, 1), Cost(1, 2, 3, 4, 5), Fingerprint("linear", 1.0)],
    ids=lambda value: type(value).__name__,
)
def test_values_cannot_be_changed(value: Any) -> None:
    for field in fields(value):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field.name, getattr(value, field.name))
