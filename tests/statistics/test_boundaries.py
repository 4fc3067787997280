"""Automatic k on constructed tables and on the embedded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from plop_ext.data import batches, encode, load_rows
from plop_ext.models import load_model
from plop_ext.scoring.score import score
from plop_ext.statistics import AutoK, auto_k
from plop_ext.statistics.boundaries import Boundary, find_boundaries
from tests.support import plain_statistics as plain
from tests.support.gain_tables import irregular, scores, table


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
    found = auto_k(table([1.0, 1.005, 1.3], sample_sd=0.0001))
    assert found.boundaries[0].over_samples == 1.0 and found.boundaries[0].over_layers == 1.0
    assert ks(found) == [2]


def test_the_reason_names_the_test_that_failed_and_no_other() -> None:
    """Certain except for the size of the steps: no tie."""
    found = auto_k(table([1.0, 1.004, 1.008, 1.012], sample_sd=0.0001))
    assert found.reason.endswith("the cut between c and d fails: NFN rises by only 0.4 %")
    assert auto_k(table([1.0, 1.0, 1.0, 1.0])).boundaries[2].failures[0].endswith("give the same 3 lowest types")


def test_a_boundary_at_every_limit_survives_and_below_each_says_so() -> None:
    limit = Boundary(2, 0.01, 0.99, 0.95, True)
    assert limit.survives and limit.failures == ()
    below = Boundary(2, 0.00999, 0.98974, 0.94999, False)
    assert not below.survives and below.failures == (
        "only 98.9 % of the resamples of samples give the same 2 lowest types",
        "only 94.9 % of the resamples of layers give the same 2 lowest types",
        "leaving out one of the layers changes the 2 lowest types",
        "NFN rises by only 1 %",
    )
    assert replace(below, k=5, over_samples=0.5, gap=0.00456).failures[::3] == (
        "only 50 % of the resamples of samples give the same 5 lowest types",
        "NFN rises by only 0.46 %",
    )
    for name in ("gap", "over_samples", "over_layers", "without_a_layer"):
        assert len(replace(limit, **{name: getattr(below, name)}).failures) == 1


@pytest.mark.parametrize("seed", [0, 3])
def test_boundaries_equal_loops(seed: int) -> None:
    source = irregular()
    samples = plain.shares_of_same_lowest(plain.types_over_samples(source, 1000, seed))
    layers = plain.shares_of_same_lowest(plain.types_over_layers(source, 1000, seed))
    rows = plain.without_each_layer(source)
    nfn = [plain.type_nfn(source, label, plain.all_of(source)) for label in source.types]
    found = find_boundaries(source, seed)
    assert [boundary.k for boundary in found] == [1, 2, 3, 4]
    for boundary, over_samples, over_layers in zip(found, samples, layers, strict=True):
        k = boundary.k
        assert boundary.gap == pytest.approx(nfn[k] / nfn[k - 1] - 1)
        assert boundary.over_samples == pytest.approx(over_samples)
        assert boundary.over_layers == pytest.approx(over_layers)
        assert boundary.without_a_layer is all(max(row[:k]) < min(row[k:]) for row in rows)
    assert {boundary.without_a_layer for boundary in found} == {True, False}
    assert auto_k(source, seed=seed).boundaries == found
    assert find_boundaries(source) == find_boundaries(source, 0) == auto_k(source).boundaries


def choice(surviving: Sequence[int], types: int = 7, **arguments: int) -> AutoK:
    """Automatic k where these cuts survive and the others miss the smallest step."""
    made = tuple(Boundary(k, 0.5 if k in surviving else 0.005, 1.0, 1.0, True) for k in range(1, types))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plop_ext.statistics.boundaries.find_boundaries", lambda table, seed: made)
        found = auto_k(table([float(level) for level in range(1, types + 1)], layers=1, samples=2), **arguments)
    assert found.boundaries == made and found.found is bool(surviving) and found.reason.startswith(f"{found.k}: ")
    return found


def test_of_the_cuts_that_survive_the_nearest_to_3_is_chosen_and_of_two_the_lower() -> None:
    assert choice([5]).reason == "5: the only cut that is stable under resampling"
    assert choice([5], fallback=4).k == 5
    assert choice([1, 4]).reason == (
        "4: of the cuts after 1 and 4, which are stable under resampling, the nearest to 3"
    )
    assert choice([1, 2, 4, 6]).reason == (
        "2: of the cuts after 1, 2, 4 and 6, which are stable under resampling, the nearest to 3"
    )
    assert [choice(cuts).k for cuts in ([2, 4], [1, 5], [1, 6], [4, 6], [1, 3, 6])] == [2, 1, 1, 4, 3]


def test_where_none_survives_the_reason_says_whose_number_it_is_and_what_fails() -> None:
    none = "no cut passes every test, so this is"
    fails = "fails: NFN rises by only 0.5 %"
    paper, budget = "the paper's number", "the most that the budget allows"
    assert choice([]).reason == f"3: {none} {paper}; the cut between c and d {fails}"
    assert choice([], fallback=1).reason == f"1: {none} {budget}; the cut between a and b {fails}"
    assert choice([], fallback=6).reason == f"6: {none} {budget}; the cut between f and g {fails}"
    assert choice([], fallback=7).reason == f"7: {none} {budget}"
    assert choice([], types=3).reason == f"3: {none} {paper}"
    assert choice([], types=2).reason == f"2: {none} {paper}"
    assert choice([], types=1).reason == "1: there is one type"
    assert choice([], types=1, fallback=0).reason == "0: there is one type"


def test_all_failures_of_the_cut_are_listed() -> None:
    found = auto_k(table([1.0, 1.0001, 1.0002, 1.0003], samples=4, own_layer_sd=0.1))
    assert found.reason.endswith("fails: " + ", ".join(found.boundaries[2].failures))
    assert len(found.boundaries[2].failures) > 2


def test_the_data_can_move_a_boundary_that_layers_do_not() -> None:
    found = auto_k(table([1.0, 1.02, 1.5], samples=4, layers=2, sample_sd=0.1, seed=1))
    assert found.boundaries[0].over_samples < 0.99 and not found.boundaries[0].survives


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
