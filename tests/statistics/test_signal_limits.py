"""Where a signal begins: exact half-widths, and both limits of what halves of the data may disagree on."""

from __future__ import annotations

import math
import warnings
from statistics import NormalDist

import numpy as np
import pytest

from plop_ext.statistics import GainTable, find_signal, stability
from plop_ext.statistics.resampling import halves
from plop_ext.statistics.signal import Signal, random_half_widths
from tests.support import plain_statistics as plain
from tests.support.gain_tables import irregular, table


def of_nfn(values: list[list[float]], out_features: list[float], types: str) -> GainTable:
    """Modules with these NFN [M, S]; one token per sample."""
    ones = np.ones((len(values), len(values[0])))
    return GainTable.make(np.array(values), ones, ones[:, 0], np.array(out_features), types, range(len(types)))


def test_the_half_width_of_one_sample_is_what_random_weights_scatter() -> None:
    source = of_nfn([[0.5], [0.6], [2.0]], [8.5, 32.5, 128.5], "aab")
    # 97.5 % of two types: 98.75 %. Variances are 1 / (2 M - 1), and a mean of two has half the mean variance.
    z = 2.241402727604947
    expected = [z * math.sqrt((1 / 16 + 1 / 64) / 4), z * math.sqrt(1 / 256)]
    assert random_half_widths(source).tolist() == pytest.approx(expected, rel=1e-9)
    one = of_nfn([[0.5]], [50.5], "a")
    assert random_half_widths(one).tolist() == pytest.approx([1.959963984540054 / 10], rel=1e-9)


@pytest.mark.parametrize("seed", [0, 2])
def test_the_scatter_over_samples_adds_to_it(seed: int) -> None:
    source = irregular()
    over_samples = plain.types_over_samples(source, 1000, seed)
    z = NormalDist().inv_cdf(1 - 0.05 / 2 / 5)
    for place, label in enumerate(source.types):
        rows = [source.out_features[module] for module in plain.members(source, label)]
        by_weights = sum(1 / (2 * count - 1) for count in rows) / len(rows) ** 2
        expected = z * math.sqrt(np.var(over_samples[:, place]) + by_weights)
        assert random_half_widths(source, seed)[place] == pytest.approx(expected)
    np.testing.assert_array_equal(random_half_widths(source), random_half_widths(source, 0))


def test_two_samples_scatter() -> None:
    wide = random_half_widths(of_nfn([[0.5, 1.5]], [1e12], "a"))
    assert wide[0] > 1.0 and random_half_widths(of_nfn([[1.0, 1.0]], [1e12], "a"))[0] < 1e-5


def test_the_half_width_is_of_the_same_seed() -> None:
    def at(level: float) -> GainTable:
        return of_nfn([[level - 0.2, level, level + 0.1, level + 0.1]], [1e9], "a")

    widths = [random_half_widths(at(1.0), seed)[0] for seed in range(10)]
    between = float(np.median(widths))
    assert [find_signal(at(1 + between), seed).found for seed in range(10)] == [width < between for width in widths]


def test_every_type_must_be_1_to_be_no_signal_and_the_reason_names_the_range() -> None:
    # One sample of modules with 200 rows: a half-width of 0.098 for one type, 0.112 for two.
    far, near = [[0.8], [1.05]], [[0.954], [1.1]]
    assert find_signal(of_nfn(far, [200, 200], "ab")) == Signal(True, "", None)
    assert find_signal(of_nfn(near, [200, 200], "ab")) == Signal(
        False,
        "every type's NFN is 1 within its interval (0.954 to 1.100), as in an untrained model; check that the right "
        "checkpoint was loaded",
        None,
    )
    assert find_signal(of_nfn([[1.1]], [200], "a")).found and not find_signal(of_nfn([[1.095]], [200], "a")).found
    # At the limit itself: without any scatter, 1 is 1.
    assert not find_signal(of_nfn([[1.0]], [math.inf], "a")).found


# Halves of samples {0, 1} and {2, 3} disagree, others do not.
DIVIDED = [[1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 1.5, 1.75]]


@pytest.mark.parametrize("seed", [0, 2])
def test_halves_need_4_samples_and_2_types(seed: int) -> None:
    assert find_signal(of_nfn([row[:3] for row in DIVIDED], [64, 64], "ab"), seed).halves_tau is None
    assert find_signal(of_nfn(DIVIDED[1:], [64], "a"), seed).halves_tau is None
    source = of_nfn(DIVIDED, [64, 64], "ab")
    expected = stability.tau_between(*halves(source, 200, seed)).mean()
    assert find_signal(source, seed).halves_tau == pytest.approx(expected) and -1 < expected < 1


def test_halves_without_tokens_of_a_type_are_left_out() -> None:
    """As the modules of a vision tower, where only some samples have an image."""

    def of(with_images: int) -> GainTable:
        ones = np.ones((3, 8))
        ones[2, with_images:] = 0.0
        gains = 2 * ones * np.random.default_rng(0).uniform(0.2, 1.8, (3, 8))
        return GainTable.make(gains, ones, np.ones(3), np.full(3, 1e6), "abc", range(3))

    source = of(2)
    first, second = halves(source)
    both = [row for row in range(200) if np.isfinite(first[row]).all() and np.isfinite(second[row]).all()]
    assert 50 < len(both) < 150
    found = find_signal(source)
    assert found.halves_tau == pytest.approx(stability.tau_between(first[both], second[both]).mean())
    assert not found.found and found.reason.startswith("halves of the data disagree")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_signal(of(1)) == Signal(True, "", None)


def test_the_seed_is_0_unless_given() -> None:
    source = of_nfn(DIVIDED, [64, 64], "ab")
    assert find_signal(source) == find_signal(source, 0) != find_signal(source, 1)


FIRST = [1.0, 2.0, 3.0, 4.0]
REVERSED = [4.0, 3.0, 2.0, 1.0]
# The lowest is the same, and its tau is 0.
REST_REVERSED = [1.0, 4.0, 3.0, 2.0]
# No set is the same, and its tau is 0.
LOWEST_LAST = [4.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("halves_of_20", "tau", "found"),
    [
        ([FIRST] * 10 + [LOWEST_LAST] * 10, 0.5, True),
        ([FIRST] * 9 + [LOWEST_LAST] * 11, 0.45, False),
        ([REST_REVERSED] * 19 + [REVERSED], -0.05, True),
        ([REST_REVERSED] * 18 + [REVERSED] * 2, -0.1, False),
    ],
)
def test_halves_disagree_below_a_tau_of_half_without_a_set_that_holds_in_95_percent(
    halves_of_20: list[list[float]], tau: float, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = np.array([FIRST] * 20), np.array(halves_of_20)
    monkeypatch.setattr("plop_ext.statistics.signal.halves", lambda table, seed: made)
    signal = find_signal(table([0.5, 0.6, 0.7, 0.8]))
    reason = f"halves of the data disagree on the order of types (tau {tau:.2f}); score more data"
    assert (signal.found, signal.reason) == (found, "" if found else reason)
    assert signal.halves_tau == pytest.approx(tau)
