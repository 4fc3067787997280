"""Bootstraps against loops, and which types share resamples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plop_ext.statistics import GainTable, resampling, stability, summarize
from tests.support.gain_tables import table


def test_a_draw_is_the_ratio_of_sums_over_the_drawn_samples() -> None:
    source = table([0.8, 1.1, 1.5], layers=3, samples=6)
    weights = resampling.resample_counts(6, 5, seed=1)
    values = source.type_nfn(weights)
    for row, counts in enumerate(weights.astype(int)):
        chosen = [sample for sample, count in enumerate(counts) for _ in range(count)]
        assert len(chosen) == 6
        for position, label in enumerate(source.types):
            members = [m for m in range(9) if source.types[source.type_index[m]] == label]
            nfn = [
                sum(source.sum_gain[m, s] for s in chosen) / sum(source.tokens[m, s] for s in chosen) for m in members
            ]
            assert values[row, position] == pytest.approx(sum(nfn) / len(nfn), rel=1e-12)


def test_tokens_weigh_alike_not_samples() -> None:
    source = GainTable.make(np.array([[10.0, 600.0]]), np.array([[10.0, 300.0]]), np.ones(1), np.ones(1), ["a"], [0])
    assert source.type_nfn(np.ones((1, 2)))[0, 0] == pytest.approx(610 / 310)


def test_modules_without_tokens_in_a_draw_are_left_out_of_their_type() -> None:
    tokens = np.array([[10.0, 0.0], [10.0, 10.0]])
    source = GainTable.make(tokens * np.array([[3.0], [1.0]]), tokens, np.ones(2), np.ones(2), ["a", "a"], [0, 1])
    assert source.type_nfn(np.array([[1.0, 1.0], [0.0, 2.0]]))[:, 0].tolist() == [2.0, 1.0]
    assert np.isfinite(resampling.types_over_samples(source)).all()


def test_draws_repeat_with_their_seed() -> None:
    source = table([0.8, 1.1])
    first = resampling.types_over_samples(source, seed=3)
    assert (first == resampling.types_over_samples(source, seed=3)).all()
    assert (first != resampling.types_over_samples(source, seed=4)).any()
    assert summarize(source).to_dict() == summarize(source).to_dict()


def test_resamples_of_layers_are_shared_by_types_of_the_same_layers() -> None:
    source = table([1.0, 1.02], layers=16, layer_sd=0.3)
    values = resampling.types_over_layers(source)
    assert values[:, 0].std() > 0.05
    np.testing.assert_allclose(values[:, 1] / values[:, 0], 1.02, rtol=0.02)
    assert (stability.neighbours_hold(values) > 0.99).all()


def test_types_of_other_layers_are_drawn_on_their_own_and_one_layer_has_no_spread() -> None:
    layers = [0, 2, 4, 6, 1, 3, 5, 7, 0]
    labels = ["even"] * 4 + ["odd"] * 4 + ["once"]
    nfn = np.array([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 9.0])
    tokens = np.full((9, 4), 10.0)
    source = GainTable.make(nfn[:, None] * tokens, tokens, np.ones(9), np.ones(9), labels, layers)
    values = resampling.types_over_layers(source)
    columns = {label: values[:, place] for place, label in enumerate(source.types)}
    assert abs(np.corrcoef(columns["even"], columns["odd"])[0, 1]) < 0.1
    assert set(columns["once"]) == {9.0}
    found = {item.type: item for item in summarize(source).types}
    assert found["once"].over_layers is None and found["once"].without_a_layer is None
    assert found["even"].over_layers is not None
    assert found["even"].without_a_layer == pytest.approx(((1 + 2 + 3) / 3, (2 + 3 + 4) / 3))


def test_spread_over_layers_is_the_known_standard_error() -> None:
    source = table([1.0], layers=40, own_layer_sd=0.2, sample_sd=0.0)
    _, sums, _ = source.layer_sums()
    expected = sums[0].std(ddof=1) / math.sqrt(40)
    values = resampling.types_over_layers(source, resamples=20_000)
    assert values.std() == pytest.approx(expected * 1.033, rel=0.03)  # t instead of z for 39 degrees of freedom


# Table values of t at 0.975.
@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042), (120, 1.980)]
)
def test_t_quantile(degrees: int, value: float) -> None:
    assert resampling.t_quantile(0.975, degrees) == pytest.approx(value, rel=3e-3)


def test_tau_and_sets_of_known_orders() -> None:
    same, reverse = np.array([[1.0, 2.0, 3.0]]), np.array([[3.0, 2.0, 1.0]])
    swapped = np.array([[1.0, 3.0, 2.0]])
    assert stability.tau_between(same, reverse).tolist() == [-1.0]
    assert stability.tau_between(same, swapped).tolist() == pytest.approx([1 / 3])
    values = np.concatenate([same, same, swapped, reverse])
    assert stability.set_holds(values, np.arange(3)).tolist() == [0.75, 0.5]
    assert stability.among_lowest(values, 1).tolist() == [0.75, 0.0, 0.25]
    assert stability.same_lowest(values, values[[0, 2, 2, 3]]).tolist() == [1.0, 0.75]
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = np.mean([stability.tau_between(values[[i]], values[[j]])[0] for i, j in pairs])
    assert stability.mean_tau(values) == pytest.approx(expected)


def test_one_sample_has_no_interval_over_the_data_and_says_nothing_is_sure() -> None:
    found = summarize(table([0.5, 1.0, 2.0, 4.0], samples=1))
    assert all(item.over_samples is None and item.p_samples is None for item in found.types)
    assert found.set_over_samples == 0.0 and found.tau_samples is None
    assert not found.auto.found


def test_ties_name_the_neighbours_and_whether_they_straddle_the_cut() -> None:
    found = summarize(table([0.8, 0.9, 1.0, 1.001, 1.5, 1.501], own_layer_sd=0.02, sample_sd=0.01))
    assert [(tie.lower, tie.upper, tie.crosses_cut) for tie in found.ties] == [("c", "d", True), ("e", "f", False)]
    assert found.types[0].p_samples == 1.0 and found.types[5].p_layers == 0.0
    assert 0.2 < found.types[2].p_layers < 0.8
    assert found.tau_layers < 1.0
