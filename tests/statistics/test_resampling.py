"""Bootstraps against loops, and which types share resamples."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np
import pytest

from plop_ext.statistics import GainTable, resampling, stability, summarize
from plop_ext.statistics.resampling import halves
from tests.support import plain_statistics as plain
from tests.support.gain_tables import irregular, table


def test_resamples_are_of_the_size_of_the_data_and_every_unit_is_as_likely() -> None:
    counts = resampling.resample_counts(5, 4000, seed=1)
    assert counts.shape == (4000, 5) and (counts.sum(axis=1) == 5).all() and (counts >= 0).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1.0, atol=0.05)
    # Binomial: n / n * (1 - 1 / n).
    np.testing.assert_allclose(counts.var(axis=0), 0.8, atol=0.06)
    drawn = np.random.default_rng(1).integers(0, 5, size=(4000, 5)).tolist()
    assert counts.tolist() == [[row.count(unit) for unit in range(5)] for row in drawn]


@pytest.mark.parametrize("seed", [0, 4])
def test_bootstraps_equal_loops(seed: int) -> None:
    source = irregular()
    equal = functools.partial(np.testing.assert_allclose, rtol=1e-12)
    equal(resampling.types_over_samples(source, 40, seed), plain.types_over_samples(source, 40, seed))
    equal(resampling.modules_over_samples(source, 40, seed), plain.modules_over_samples(source, 40, seed))
    equal(resampling.types_over_layers(source, 40, seed), plain.types_over_layers(source, 40, seed))
    with np.errstate(all="raise"):
        equal(resampling.without_each_layer(source), plain.without_each_layer(source))


def test_there_are_1000_resamples_of_seed_0_unless_others_are_asked_for() -> None:
    source = irregular()
    for bootstrap in (resampling.types_over_samples, resampling.modules_over_samples, resampling.types_over_layers):
        np.testing.assert_array_equal(bootstrap(source), bootstrap(source, 1000, 0))
    np.testing.assert_array_equal(halves(source), halves(source, 200, 0))


@pytest.mark.parametrize("samples", [4, 7])
def test_halves_share_no_sample_and_miss_none(samples: int) -> None:
    # NFN times the size of a half are the powers of 2 of the samples in it.
    powers = 2.0 ** np.arange(samples)
    source = GainTable.make(powers[None], np.ones((1, samples)), np.ones(1), np.ones(1), ["a"], [0])
    first, second = (values[:, 0] for values in halves(source, splits=300, seed=2))
    small = samples // 2
    assert first.shape == second.shape == (300,)
    np.testing.assert_allclose(first * small + second * (samples - small), powers.sum())
    chosen = (first * small).round().astype(int).tolist()
    assert {value.bit_count() for value in chosen} == {small} and len(set(chosen)) == math.comb(samples, small)
    assert chosen != (halves(source, splits=300, seed=3)[0][:, 0] * small).round().astype(int).tolist()


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
    layers = [0, 2, 4, 6, 1, 3, 5, 7, 0, 0]
    labels = ["even"] * 4 + ["odd"] * 4 + ["once"] * 2
    nfn = np.array([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 8.0, 10.0])
    tokens = np.full((10, 4), 10.0)
    source = GainTable.make(nfn[:, None] * tokens, tokens, np.ones(10), np.ones(10), labels, layers)
    values = resampling.types_over_layers(source)
    columns = {label: values[:, place] for place, label in enumerate(source.types)}
    assert abs(np.corrcoef(columns["even"], columns["odd"])[0, 1]) < 0.1
    assert set(columns["once"]) == {9.0}
    assert resampling.without_each_layer(source)[:, source.types.index("once")].tolist() == [9.0] * 8
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
    ("degrees", "value"),
    [(1, 12.7062047362), (2, 4.30265272975), (3, 3.18245), (4, 2.77645), (10, 2.2281389), (30, 2.0422724563)],
)
def test_t_quantile(degrees: int, value: float) -> None:
    close = {1: 1e-11, 2: 1e-11, 3: 2e-3, 4: 5e-4, 10: 1e-5, 30: 1e-7}[degrees]
    assert resampling.t_quantile(0.975, degrees) == pytest.approx(value, rel=close)
    assert resampling.t_quantile(0.025, degrees) == pytest.approx(-value, rel=close)


@pytest.mark.parametrize(
    ("z", "terms"),
    [(1, (1 / 2, 1 / 4, 1 / 16, -528 / 92160)), (2, (5 / 2, 294 / 96, 1098 / 384, 169950 / 92160))],
)
def test_the_terms_of_the_expansion_of_t(z: int, terms: tuple[float, ...]) -> None:
    expected = z + terms[0] / 3 + terms[1] / 9 + terms[2] / 27 + terms[3] / 81
    assert resampling.t_quantile(NormalDist().cdf(z), 3) == pytest.approx(expected, rel=1e-12)


def test_quartiles_of_t_with_1_and_2_degrees() -> None:
    assert resampling.t_quantile(0.75, 1) == pytest.approx(1.0, rel=1e-12)
    assert resampling.t_quantile(0.75, 2) == pytest.approx(math.sqrt(2 / 3), rel=1e-12)


def test_widening_makes_a_bootstrap_interval_a_t_interval() -> None:
    assert math.isnan(resampling.widening(1)) and math.isnan(resampling.widening(0))
    z = 1.959963984540054
    assert resampling.widening(2) == pytest.approx(math.sqrt(2) * 12.7062047362 / z, rel=1e-10)
    assert resampling.widening(3) == pytest.approx(math.sqrt(3 / 2) * 4.30265272975 / z, rel=1e-10)
    assert [round(resampling.widening(n), 2) for n in (4, 10, 64)] == [1.87, 1.22, 1.03]
    assert resampling.widening(2, confidence=0.5) == pytest.approx(math.sqrt(2) / NormalDist().inv_cdf(0.75))


def test_an_interval_leaves_out_the_same_share_below_and_above() -> None:
    values = np.stack([np.arange(101.0), 2 * np.arange(101.0)[::-1]], axis=1)
    np.testing.assert_allclose(resampling.interval(values), [[2.5, 5.0], [97.5, 195.0]])
    np.testing.assert_allclose(resampling.interval(values, confidence=0.5), [[25.0, 50.0], [75.0, 150.0]])
    values[0, 0] = values[100, 0] = math.nan
    np.testing.assert_allclose(resampling.interval(values, confidence=0.0), [[50.0, 100.0], [50.0, 100.0]])
