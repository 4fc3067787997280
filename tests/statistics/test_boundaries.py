"""Automatic k on constructed tables and on the embedded model."""

from __future__ import annotations

import pytest

from plop_ext.data import batches, encode, load_rows
from plop_ext.models import load_model
from plop_ext.scoring.score import score
from plop_ext.statistics import AutoK, auto_k
from plop_ext.statistics.boundaries import MIN_GAP, Boundary
from tests.support.gain_tables import scores, table


def ks(found: AutoK) -> list[int]:
    return [boundary.k for boundary in found.boundaries if boundary.survives]


@pytest.mark.parametrize("seed", range(5))
def test_a_clear_gap_is_found(seed: int) -> None:
    found = auto_k(table([1.0, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5], own_layer_sd=0.1, seed=seed))
    assert (found.k, found.found, ks(found)) == (2, True, [2])
    assert found.reason == "2: the only cut that is stable under resampling"


@pytest.mark.parametrize("seed", range(5))
def test_without_a_gap_it_says_so_and_why_and_falls_back_to_3(seed: int) -> None:
    source = table([1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06], own_layer_sd=0.1, seed=seed)
    found = auto_k(source)
    assert (found.k, found.found, ks(found)) == (3, False, [])
    assert found.reason.startswith("3: no cut passes every test, so this is the paper's number; ")
    assert f"the cut between {source.types[2]} and {source.types[3]} fails: only" in found.reason
    assert "of the resamples of layers give the same" in found.reason
    assert auto_k(source, fallback=5).k == 5


@pytest.mark.parametrize("seed", range(5))
def test_of_two_gaps_the_one_nearest_to_3_counts_not_the_larger(seed: int) -> None:
    found = auto_k(table([1.0, 1.0, 1.4, 1.4, 1.4, 3.0, 3.0], own_layer_sd=0.08, seed=seed))
    assert (found.k, ks(found)) == (2, [2, 5])
    assert auto_k(table([1.0, 1.4, 1.4, 1.4, 1.9, 1.9, 1.9], own_layer_sd=0.05, seed=seed)).k == 4
    assert auto_k(table([1.0, 1.0, 1.4, 1.4, 1.9, 1.9, 1.9], own_layer_sd=0.05, seed=seed)).k == 2


@pytest.mark.parametrize("seed", range(5))
def test_a_gap_that_one_deviant_layer_makes_is_none(seed: int) -> None:
    levels = [1.0, 1.0, 1.0, 1.002, 1.003, 1.004, 1.005]
    # Only layer 0 raises four types, by half.
    changes = {(t, 0): 1.5 for t in (3, 4, 5, 6)}
    found = auto_k(table(levels, own_layer_sd=0.005, changes=changes, seed=seed))
    third = found.boundaries[2]
    assert third.gap > 0.03 and third.over_samples == 1.0
    assert not third.survives and not found.found and found.k == 3


def test_leaving_one_layer_out_is_a_test_of_its_own() -> None:
    levels = [1.0, 1.0, 1.0, 0.99, 0.99, 0.99, 0.99]
    found = auto_k(table(levels, sample_sd=0.001, changes={(t, 0): 4.0 for t in (3, 4, 5, 6)}))
    assert found.boundaries[2].gap > 0.2 and not found.boundaries[2].without_a_layer


def test_a_certain_but_tiny_step_is_no_boundary() -> None:
    found = auto_k(table([1.0, 1.0 + MIN_GAP / 2, 1.3], sample_sd=0.0001))
    assert found.boundaries[0].over_samples == 1.0 and found.boundaries[0].over_layers == 1.0
    assert ks(found) == [2]


def test_the_reason_names_the_test_that_failed_and_no_other() -> None:
    """Certain except for the size of the steps: no tie."""
    found = auto_k(table([1.0, 1.004, 1.008, 1.012], sample_sd=0.0001))
    assert found.reason.endswith("the cut between c and d fails: NFN rises by only 0.4 %")
    assert auto_k(table([1.0, 1.0, 1.0, 1.0])).boundaries[2].failures[0].endswith("give the same 3 lowest types")
    assert Boundary(2, 0.5, 0.98974, 1.0, True).failures == (
        "only 98.9 % of the resamples of samples give the same 2 lowest types",
    )
    assert Boundary(2, 0.5, 1.0, 1.0, False).failures == ("leaving out one of the layers changes the 2 lowest types",)
    assert Boundary(2, 0.5, 1.0, 1.0, True).failures == ()


def test_the_data_can_move_a_boundary_that_layers_do_not() -> None:
    found = auto_k(table([1.0, 1.02, 1.5], samples=4, layers=2, sample_sd=0.1, seed=1))
    assert found.boundaries[0].over_samples < 0.99 and not found.boundaries[0].survives


def test_one_type() -> None:
    found = auto_k(table([0.5]))
    assert (found.k, found.found, found.boundaries) == (1, False, ())


def test_scores_place_by_it_and_say_why() -> None:
    placement = scores(table([1.0, 1.0, 1.5, 1.5, 1.5], own_layer_sd=0.05)).place(types="auto")
    assert set(placement.types) == {"a", "b"}
    assert placement.reason == "automatic k is 2: the only cut that is stable under resampling"


def test_embedded_model() -> None:
    """gate and down of the embedded model are 9 % apart, and layers disagree on their order: 3 would cut a tie."""
    model, tokenizer = load_model("plop-tiny", device="cpu")
    encoded = encode(load_rows("arithmetic", max_samples=32), tokenizer)
    data = batches(encoded, pad_token_id=tokenizer.pad_token_id)
    found = score(model, data, max_samples=None, progress=False).statistics()
    assert found.auto.found and found.auto.k == 2
    assert [(tie.lower, tie.upper) for tie in found.ties if tie.crosses_cut] == [("gate_proj", "down_proj")]
