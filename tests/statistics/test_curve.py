"""How the choice stabilizes with the number of samples."""

from __future__ import annotations

import numpy as np
import pytest

from plop_ext.statistics import stability
from plop_ext.statistics.curve import CurvePoint, stability_curve
from tests.support import plain_statistics as plain
from tests.support.gain_tables import table


def test_it_rises_to_what_all_samples_say() -> None:
    noisy = table([1.0, 1.02, 1.04, 1.06], samples=48, sample_sd=0.4, layers=4)
    points = stability_curve(noisy, 2)
    assert [point.samples for point in points] == [1, 2, 4, 8, 16, 32, 48]
    shares = [point.same_set for point in points]
    assert shares[0] < shares[-1] and all(0 <= share <= 1 for share in shares)
    sure = stability_curve(table([0.5, 1.0, 2.0], samples=4), 1)
    assert sure == tuple(CurvePoint(samples, 1.0, 1.0) for samples in (1, 2, 4))


@pytest.mark.parametrize("seed", [0, 5])
def test_each_size_is_400_resamples_with_replacement(seed: int) -> None:
    source = table([1.0, 1.1, 1.2], samples=3, layers=2, sample_sd=0.5)
    rng = np.random.default_rng(seed)
    for size, point in zip((1, 2, 3), stability_curve(source, 2, seed), strict=True):
        chosen = rng.integers(0, 3, size=(400, size)).tolist()
        counts = [[row.count(sample) for sample in range(3)] for row in chosen]
        values = np.array([[plain.type_nfn(source, label, row) for label in source.types] for row in counts])
        all_samples = np.array([[plain.type_nfn(source, label, plain.all_of(source)) for label in source.types]] * 400)
        assert point.samples == size
        assert point.same_set == pytest.approx(plain.shares_of_same_lowest(values)[1])
        assert point.tau == pytest.approx(stability.tau_between(values, all_samples).mean())
        assert 0 < point.same_set < 1 and -1 < point.tau < 1


def test_the_seed_is_0_unless_given() -> None:
    source = table([1.0, 1.1, 1.2], samples=3, layers=2, sample_sd=0.5)
    assert stability_curve(source, 2) == stability_curve(source, 2, 0) != stability_curve(source, 2, 1)


def test_a_set_of_all_types_and_the_order_of_one_are_always_the_same() -> None:
    noisy = table([1.0, 1.02], samples=8, sample_sd=0.5, layers=1)
    for k in (2, 3):
        assert [point.same_set for point in stability_curve(noisy, k)] == [1.0] * 4
    assert stability_curve(noisy, 1)[0].same_set < 1.0 and stability_curve(noisy, 2)[0].tau < 1.0
    assert stability_curve(table([1.0], samples=1), 1) == (CurvePoint(1, 1.0, 1.0),)
