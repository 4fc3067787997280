"""The page docs/models.md says what is true of the classes of transformers."""

from __future__ import annotations

from collections import Counter

from tests.support.census.models import classes
from tests.support.census.refusals import NOT_BUILT, OPEN, UPSTREAM
from tests.support.census.table import rows


def test_every_class_is_in_the_page_or_not_built_for_a_reason() -> None:
    listed = set(rows())
    assert listed | set(NOT_BUILT) == set(classes())
    assert not listed & set(NOT_BUILT)
    assert set(UPSTREAM) | set(OPEN) <= listed


def test_the_page_covers_enough_classes() -> None:
    kinds = Counter(classes()[name][0] == "causal" for name in rows() if name not in {*UPSTREAM, *OPEN})
    assert kinds[True] >= 150
    assert kinds[False] >= 60
