"""When scoring may stop."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from plop_ext.errors import InputError
from plop_ext.statistics import GainTable, StopRule, set_stability
from tests.support import plain_statistics as plain
from tests.support.gain_tables import irregular, table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"types": 0}, "`types` must be at least 1, got 0"),
        ({"confidence": 0.5}, "`confidence` must be above 0.5 and at most 1, got 0.5"),
        ({"confidence": 1.01}, "`confidence` must be above 0.5 and at most 1, got 1.01"),
        ({"modules": 0}, "`modules` must be a number (24, 10M) or a fraction (0.25, 5%), got 0"),
        ({"modules": -0.5}, "`modules` must be a number (24, 10M) or a fraction (0.25, 5%), got -0.5"),
        ({"types": 2, "modules": 3}, "`types` and `modules` of the stop rule exclude each other; give one"),
        ({"types": True}, "`types` must be a whole number, got True"),
        ({"min_samples": 1}, "`min_samples` must be at least 2, got 1"),
    ],
)
def test_bad_rules(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        StopRule(**arguments)


def test_the_strictest_and_the_loosest_rules() -> None:
    StopRule(types=1, confidence=1, min_samples=2)
    StopRule(confidence=0.501, modules=1)
    assert StopRule() == StopRule(types=3, modules=None, confidence=0.99, min_samples=None)


def test_the_first_look_is_at_4_samples_and_at_64_for_modules_unless_given() -> None:
    assert [StopRule().first_look, StopRule(modules=1).first_look] == [4, 64]
    assert [StopRule(min_samples=2).first_look, StopRule(modules=1, min_samples=9).first_look] == [2, 9]


@pytest.mark.parametrize(("first", "rule"), [(4, StopRule()), (2, StopRule(min_samples=2))])
def test_looks_become_rare(first: int, rule: StopRule) -> None:
    looks, last = [], 0
    for samples in range(1, 513):
        if rule.is_due(samples, last):
            looks.append(samples)
            last = samples
    assert looks == [*range(first, 65), 80, 100, 125, 157, 197, 247, 309, 387, 484]


def test_a_late_first_look_is_not_early_for_rarity() -> None:
    rule = StopRule(min_samples=100)
    assert not rule.is_due(99, 0) and rule.is_due(100, 0)


def test_what_is_stable() -> None:
    assert set_stability(table([1.0, 1.1, 1.2, 2.0]), StopRule()) == 1.0
    unsure = table([1.0, 1.1, 1.2, 1.2001, 2.0], samples=8, sample_sd=0.05)
    assert 0.3 < set_stability(unsure, StopRule()) < 0.9
    # Only the set counts: the order inside it may be open.
    assert set_stability(table([1.2, 1.2001, 1.2002, 2.0], samples=8, sample_sd=0.05), StopRule()) == 1.0
    modules = table([1.0, 2.0], layers=4, own_layer_sd=0.1, samples=64, sample_sd=0.01)
    assert set_stability(modules, StopRule(modules=0.5)) == 1.0


def test_it_is_the_share_of_1000_resamples_with_the_same_set() -> None:
    source, seed = irregular(), 3
    types = plain.shares_of_same_lowest(plain.types_over_samples(source, 1000, seed))
    for k in range(1, 5):
        assert set_stability(source, StopRule(types=k), seed) == pytest.approx(types[k - 1])
    assert set_stability(source, StopRule(types=5), seed) == set_stability(source, StopRule(types=6), seed) == 1.0

    values = plain.modules_over_samples(source, 1000, seed)
    point = [plain.module_nfn(source, module, plain.all_of(source)) for module in range(16)]
    modules = plain.shares_of_same_lowest(values[:, sorted(range(16), key=point.__getitem__)])
    # Integers are numbers of modules, fractions are of all 16, rounded, and one module at least.
    for asked, k in ((1, 1), (7, 7), (15, 15), (0.001, 1), (0.09, 1), (0.1, 2), (0.5, 8), (0.94, 15)):
        assert set_stability(source, StopRule(modules=asked), seed) == pytest.approx(modules[k - 1])
    assert set_stability(source, StopRule(modules=16), seed) == set_stability(source, StopRule(modules=1.0)) == 1.0
    assert 0 < min(types + modules) < 1


def test_one_sample_settles_nothing_and_two_may() -> None:
    assert set_stability(table([1.0, 1.1, 1.2, 2.0], samples=1), StopRule()) == 0.0
    assert set_stability(table([1.0, 1.1, 1.2, 2.0], samples=2, sample_sd=0.0), StopRule()) == 1.0


def test_of_modules_with_the_same_nfn_the_first_are_the_set() -> None:
    # Every other module has 1; of these, the first 20 are the lowest where only the first sample is drawn.
    gains = np.where(np.arange(64)[:, None] < 40, [[0.5, 1.5]], [[1.5, 0.5]])
    gains[::2] = 3.0
    source = GainTable.make(gains, np.ones((64, 2)), np.ones(64), np.ones(64), ["a"] * 64, range(64))
    assert set_stability(source, StopRule(modules=20)) == pytest.approx(0.25, abs=0.05)


def test_the_seed_is_0_unless_given() -> None:
    rule = StopRule(types=2)
    assert set_stability(irregular(), rule) == set_stability(irregular(), rule, 0)
    assert set_stability(irregular(), rule) != set_stability(irregular(), rule, 1)
