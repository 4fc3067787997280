"""How many samples a run reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from plop_ext.errors import InputError
from plop_ext.scoring.extent import available_samples, extent
from plop_ext.statistics import StopRule

RULE = StopRule(types=2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("auto", "auto", None), (128, StopRule())),
        (("auto", "auto", "paper-script"), (128, None)),
        (("auto", "settled", None), (128, StopRule())),
        (("auto", None, None), (128, None)),
        ((7, "auto", None), (7, None)),
        ((None, "auto", None), (None, None)),
        ((None, "settled", None), (None, StopRule())),
        ((7, RULE, None), (7, RULE)),
        ((7, None, "paper-script"), (7, None)),
    ],
    ids=str,
)
def test_limit_and_rule(arguments: Any, expected: tuple[int | None, StopRule | None]) -> None:
    assert extent(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("all", None, None), "`max_samples` must be a whole number (24, 10M, 1e9), got 'all'"),
        ((7, "soon", None), "`stop` must be 'settled', a StopRule or None, got 'soon'"),
        ((7, "settled", "paper-script"), "`stop` has no meaning with `compat`; leave one of the two out"),
        ((7, RULE, "paper-script"), "`stop` has no meaning with `compat`; leave one of the two out"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        extent(*arguments)
    assert str(caught.value) == message


class Counted(list[int]):
    """Three batches that hold ten samples."""

    samples = 10


@pytest.mark.parametrize(
    ("dataloader", "limit", "expected"),
    [
        (Counted([1, 2, 3]), None, 10),
        (Counted([1, 2, 3]), 4, 4),
        (Counted([1, 2, 3]), 40, 10),
        ([1, 2, 3], None, 12),
        ([1, 2, 3], 11, 11),
        (iter([1, 2, 3]), None, None),
        (iter([1, 2, 3]), 11, 11),
    ],
    ids=("counted", "counted-below", "counted-above", "batches", "batches-below", "unknown", "unknown-limit"),
)
def test_available_samples(dataloader: Iterable[Any], limit: int | None, expected: int | None) -> None:
    assert available_samples(dataloader, limit, batch=4) == expected
