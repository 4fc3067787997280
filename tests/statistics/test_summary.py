"""What a summary says of each type, of neighbours and of the chosen set, against loops over all resamples."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from plop_ext.statistics import GainTable, Statistics, Tie, auto_k, find_signal, stability, summarize
from tests.support import plain_statistics as plain
from tests.support.gain_tables import irregular, table

LABELS = ("gate", "k", "up", "q", "head")


def percentiles(values: np.ndarray) -> list[float]:
    return np.percentile(values, [2.5, 97.5]).tolist()


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


@pytest.mark.parametrize(("k", "seed"), [(1, 0), (4, 3)])
def test_a_summary_equals_loops(k: int, seed: int) -> None:
    source = irregular()
    found = summarize(source, k, seed)
    samples, layers = plain.types_over_samples(source, 1000, seed), plain.types_over_layers(source, 1000, seed)
    without = plain.without_each_layer(source)
    assert (found.k, found.samples, found.seed) == (k, 7, seed)
    assert tuple(item.type for item in found.types) == source.types
    deep = {label for label in source.types if len(plain.layers_of(source, label)) > 1}
    assert deep == {"q", "k", "up"}
    for place, item in enumerate(found.types):
        assert item.nfn == pytest.approx(plain.type_nfn(source, item.type, plain.all_of(source)))
        assert item.over_samples == pytest.approx(percentiles(samples[:, place]))
        assert item.p_samples == pytest.approx(share([row.argsort()[:k].tolist().count(place) for row in samples]))
        lowest = [row.argsort(kind="stable")[:k].tolist().count(place) for row in layers]
        assert item.p_layers == pytest.approx(share(lowest))
        if item.type in deep:
            assert item.over_layers == pytest.approx(percentiles(layers[:, place]))
            assert item.without_a_layer == pytest.approx((without[:, place].min(), without[:, place].max()))
        else:
            assert item.over_layers is None and item.without_a_layer is None
    assert found.set_over_samples == pytest.approx(plain.shares_of_same_lowest(samples)[k - 1])
    assert found.set_over_layers == pytest.approx(plain.shares_of_same_lowest(layers)[k - 1])
    assert found.tau_samples == pytest.approx(stability.mean_tau(samples))
    assert found.tau_layers == pytest.approx(stability.mean_tau(layers))
    modules = plain.modules_over_samples(source, 1000, seed)
    np.testing.assert_allclose(found.module_intervals, np.percentile(modules, [2.5, 97.5], axis=0).T)
    assert found.auto == auto_k(source, seed=seed) and found.signal == find_signal(source, seed)

    kept = [[share(list(rows[:, i] < rows[:, i + 1])) for i in range(4)] for rows in (samples, layers)]
    expected = [
        Tie(source.types[i], source.types[i + 1], kept[0][i], kept[1][i], crosses_cut=i + 1 == k)
        for i in range(4)
        if kept[0][i] < 0.95 or kept[1][i] < 0.95
    ]
    assert list(found.ties) == expected and 0 < len(expected)


def test_3_types_and_seed_0_unless_given() -> None:
    source = irregular()
    assert summarize(source).to_dict() == summarize(source, 3, 0).to_dict() != summarize(source, 3, 1).to_dict()
    assert [summarize(table([1.0, 2.0][:n])).k for n in (1, 2)] == [1, 2]


def test_a_set_of_all_types_is_always_the_same() -> None:
    found = summarize(irregular(), 5)
    assert found.set_over_samples == found.set_over_layers == 1.0
    assert all(item.p_samples == item.p_layers == 1.0 for item in found.types)
    assert not any(tie.crosses_cut for tie in found.ties)


def test_one_sample_has_no_interval_over_the_data_and_says_nothing_is_sure() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summarize(table([0.5, 1.0, 2.0, 4.0], samples=1))
    assert all(item.over_samples is None and item.p_samples is None for item in found.types)
    assert all(item.over_layers is not None for item in found.types)
    assert found.set_over_samples == 0.0 and found.set_over_layers == 1.0 and found.tau_samples is None
    assert [(tie.over_samples, tie.over_layers) for tie in found.ties] == [(0.0, 1.0)] * 3
    assert found.module_intervals.shape == (48, 2) and np.isnan(found.module_intervals).all()
    assert not found.auto.found


def test_two_samples_have_intervals() -> None:
    found = summarize(table([0.5, 1.0, 2.0, 4.0], samples=2))
    assert all(item.over_samples is not None and item.p_samples is not None for item in found.types)
    assert found.tau_samples == 1.0 and np.isfinite(found.module_intervals).all()


def test_ties_name_the_neighbours_and_whether_they_straddle_the_cut() -> None:
    found = summarize(table([0.8, 0.9, 1.0, 1.001, 1.5, 1.501], own_layer_sd=0.02, sample_sd=0.01))
    assert [(tie.lower, tie.upper, tie.crosses_cut) for tie in found.ties] == [("c", "d", True), ("e", "f", False)]
    assert found.types[0].p_samples == 1.0 and found.types[5].p_layers == 0.0
    assert 0.2 < found.types[2].p_layers < 0.8
    assert found.tau_layers < 1.0


@pytest.mark.parametrize(("kept", "tied"), [(0.95, False), (0.949, True)])
def test_an_order_that_holds_in_95_percent_is_no_tie(kept: float, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source = table([0.5, 1.0], samples=2)
    swapped = np.where(np.arange(1000)[:, None] < round(1000 * (1 - kept)), [[2.0, 1.0]], [[1.0, 2.0]])
    sure = np.array([[1.0, 2.0]] * 1000)
    for over_samples, over_layers in ((swapped, sure), (sure, swapped)):
        monkeypatch.setattr("plop_ext.statistics.summary.types_over_samples", lambda _, seed, v=over_samples: v)
        monkeypatch.setattr("plop_ext.statistics.summary.types_over_layers", lambda _, seed, v=over_layers: v)
        assert bool(summarize(source).ties) is tied


def one_of_each() -> Statistics:
    """Type a alone in layer 0, far below b in layers 0 and 1; every sample is like the next."""
    gains = np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    return summarize(
        GainTable.make(gains, np.ones((3, 2)), np.ones(3), np.full(3, 4096.0), ["a", "b", "b"], [0, 0, 1]), 1
    )


def test_the_dictionary_is_json_and_complete() -> None:
    found = one_of_each()
    layers = found.types[1].over_layers
    assert layers is not None and found.types[1].without_a_layer == (2.0, 4.0)
    assert json.loads(json.dumps(found.to_dict())) == {
        "k": 1,
        "confidence": 0.95,
        "resamples": 1000,
        "seed": 0,
        "signal": {"found": True, "reason": "", "halves_tau": None},
        "types": [
            {
                "type": "a",
                "nfn": 1.0,
                "over_samples": [1.0, 1.0],
                "over_layers": None,
                "without_a_layer": None,
                "p_samples": 1.0,
                "p_layers": found.types[0].p_layers,
            },
            {
                "type": "b",
                "nfn": 3.0,
                "over_samples": [3.0, 3.0],
                "over_layers": list(layers),
                "without_a_layer": [2.0, 4.0],
                "p_samples": 0.0,
                "p_layers": found.types[1].p_layers,
            },
        ],
        "ties": [
            {
                "lower": "a",
                "upper": "b",
                "over_samples": 1.0,
                "over_layers": found.types[0].p_layers,
                "crosses_cut": True,
            }
        ],
        "set_over_samples": 1.0,
        "set_over_layers": found.set_over_layers,
        "kendall_tau_samples": 1.0,
        "kendall_tau_layers": found.tau_layers,
        "auto": {
            "k": 2,
            "found": False,
            "reason": found.auto.reason,
            "boundaries": [
                {
                    "k": 1,
                    "gap": 2.0,
                    "over_samples": 1.0,
                    "over_layers": found.set_over_layers,
                    "without_a_layer": True,
                    "survives": False,
                }
            ],
        },
    }
