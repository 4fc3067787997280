"""Totals made by hand, and comparisons of the totals of two runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from plop_ext.totals import TOTALS_FIELDS, Totals


def make_totals(modules: int, samples: int, **fields: ArrayLike) -> Totals:
    """Totals with these fields, each broadcast to [modules, samples]; the others are 0."""
    assert set(fields) <= set(TOTALS_FIELDS)
    shape = modules, samples
    return Totals.from_fields({name: np.broadcast_to(fields.get(name, 0.0), shape) for name in TOTALS_FIELDS})


def assert_same_counts(found: Totals, expected: Totals) -> None:
    """Assert that the same numbers of tokens are counted and left out, in each module and sample."""
    for name in ("tokens", "skipped_zero", "skipped_nonfinite"):
        np.testing.assert_array_equal(found.fields()[name], expected.fields()[name], err_msg=name)


def assert_close(found: Totals, expected: Totals, rtol: float) -> None:
    """Assert that the counts are the same and the sums of gains and squared gains are within `rtol`."""
    assert_same_counts(found, expected)
    for name in ("sum_gain", "sum_gain_sq"):
        np.testing.assert_allclose(found.fields()[name], expected.fields()[name], rtol=rtol, err_msg=name)
