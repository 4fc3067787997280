"""One syntax for counts, sizes and shares."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from plop_ext import quantities
from plop_ext.errors import InputError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (24, 24),
        ("24", 24),
        (" 10_000 ", 10_000),
        ("10M", 10**7),
        ("1.5k", 1500),
        ("1e9", 10**9),
        (1e9, 10**9),
        ("7B", 7 * 10**9),
        (np.int64(3), 3),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_counts(value: Any, expected: int) -> None:
    found = quantities.count(value, "x")
    assert found == expected and type(found) is int
    assert quantities.count_or_share(value, "x") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("6GiB", 6 * 2**30),
        ("6gb", 6 * 10**9),
        ("1KiB", 1024),
        ("1.5 MiB", 3 * 2**19),
        (4096, 4096),
        ("500MB", 5 * 10**8),
    ],
)
def test_sizes(value: Any, expected: int) -> None:
    assert quantities.size(value, "x") == quantities.size_or_share(value, "x") == expected


@pytest.mark.parametrize(
    ("value", "expected"), [("5%", 0.05), ("0.25", 0.25), (0.25, 0.25), (1.0, 1.0), ("100%", 1.0), (".5", 0.5)]
)
def test_shares(value: Any, expected: float) -> None:
    for parse in (quantities.count_or_share, quantities.size_or_share):
        found = parse(value, "x")
        assert found == expected and type(found) is float


WRONG = (
    *(True, None, 0, -1, "", "x", "-5", "0", "6GiB!", "GiB", "1.5", 1.5, math.nan, math.inf, "1e400", "0%", "101%"),
    10**30,
)


@pytest.mark.parametrize("value", [*WRONG, [1], b"1", "1" * 5000, "1iB", "5 %x"])
def test_what_is_neither_names_the_argument(value: Any) -> None:
    for parse in (quantities.count, quantities.size, quantities.count_or_share, quantities.size_or_share):
        with pytest.raises(InputError, match=r"^`x` must be [^\n]*$"):
            parse(value, "x")


def test_a_count_has_no_unit_of_bytes_and_a_share_is_no_count() -> None:
    for value in ("6GiB", "6MB", "5%", 0.5):
        with pytest.raises(InputError, match=r"must be a whole number \(24, 10M, 1e9\)"):
            quantities.count(value, "x")
