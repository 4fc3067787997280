"""The table of gains: what it sorts, and sums of it against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plop_ext.statistics import GainTable
from tests.support import plain_statistics as plain
from tests.support.gain_tables import irregular
from tests.support.scored_modules import scored_module
from tests.support.totals import make_totals


def test_types_are_sorted_by_nfn_and_then_by_label() -> None:
    ones = np.ones((5, 1))
    gains = np.array([[3.0], [2.0], [2.0], [1.0], [5.0]])
    made = GainTable.make(gains, ones, ones[:, 0], 8 * ones[:, 0], ["up", "q", "k", "up", "head"], [0, 0, 1, 1, None])
    assert made.types == ("k", "q", "up", "head")
    assert made.type_index.tolist() == [2, 1, 0, 2, 3] and made.layer.tolist() == [0, 0, 1, 1, -1]
    assert made.type_nfn(np.ones((1, 1))).tolist() == [[2.0, 2.0, 2.0, 5.0]]
    assert made.sum_gain is gains and made.tokens is ones and made.samples == 1
    assert made.baseline.tolist() == [1.0] * 5 and made.out_features.tolist() == [8.0] * 5


def test_the_order_is_that_of_all_samples_alike() -> None:
    gains = np.array([[1.0, 5.0], [2.0, 2.0]])
    made = GainTable.make(gains, np.ones((2, 2)), np.ones(2), np.ones(2), ["late", "early"], [0, 1])
    assert made.types == ("early", "late")


def test_a_table_of_modules_takes_their_types_layers_and_rows() -> None:
    modules = [scored_module("h", "head", None, 4, 6), scored_module("l.2.q", "q", 2, 4, 8)]
    totals = make_totals(2, 3, sum_gain=[[4.0], [2.0]], tokens=[[2.0], [4.0]], skipped_zero=7.0)
    made = GainTable.of_modules(totals, np.array([1.0, 0.25]), modules)
    assert made.types == ("head", "q") and made.type_index.tolist() == [0, 1]
    assert made.layer.tolist() == [-1, 2] and made.out_features.tolist() == [6.0, 8.0]
    assert made.out_features.dtype == np.float64
    assert made.module_nfn(np.ones((1, 3))).tolist() == [[2.0, 2.0]] and made.baseline.tolist() == [1.0, 0.25]


def test_nfn_of_modules_and_types_equals_a_loop() -> None:
    table = irregular()
    # Equal rows, apart, and in no order: each has its own result.
    weights = np.array([[1.0] * 7, [0, 0, 3, 0, 0, 0, 0], [2.0, 1, 0, 1, 1, 0, 1], [1.0] * 7, [0.0] * 7])
    with np.errstate(all="raise"):
        modules, types = table.module_nfn(weights), table.type_nfn(weights)
    assert np.isnan(modules[1]).any() and np.isnan(modules[4]).all() and np.isnan(types[4]).all()
    for row, counts in enumerate(weights):
        for module in range(len(table.baseline)):
            expected = plain.module_nfn(table, module, counts)
            assert modules[row, module] == pytest.approx(expected, rel=1e-12, nan_ok=True)
        for place, label in enumerate(table.types):
            expected = plain.type_nfn(table, label, counts)
            assert types[row, place] == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_a_type_without_known_modules_has_no_mean() -> None:
    table = GainTable.make(np.ones((3, 1)), np.ones((3, 1)), np.ones(3), np.ones(3), ["a", "b", "a"], [0, 0, 1])
    values = np.array([[1.0, 5.0, 2.0], [1.0, math.nan, math.inf], [-math.inf, 4.0, 3.0]])
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(table.type_means(values), [[1.5, 5.0], [1.0, math.nan], [3.0, 4.0]])
    np.testing.assert_array_equal(table.type_means(values[:1]), [[1.5, 5.0]])


def test_sums_per_layer() -> None:
    gains = np.array([[2.0, 4.0], [1.0, 1.0], [6.0, 0.0], [9.0, 9.0]])
    made = GainTable.make(
        gains, np.ones((4, 2)), np.array([1.0, 1.0, 0.5, 1.0]), np.ones(4), ["a", "a", "a", "b"], [5, 2, 2, None]
    )
    layers, sums, counts = made.layer_sums()
    assert layers.tolist() == [-1, 2, 5]
    assert sums.tolist() == [[0.0, 7.0, 3.0], [9.0, 0.0, 0.0]]
    assert counts.tolist() == [[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]
