"""Every list of the families of the fast path is that of the code."""

from __future__ import annotations

import pytest

import plop_ext
from plop_ext.forwards.fast.families import FAMILIES, family_titles
from tests.support import fast_models
from tests.support.paths import ROOT

LISTS = {
    "README.md": (ROOT / "README.md").read_text(encoding="utf-8"),
    "docs/fast.md": (ROOT / "docs" / "fast.md").read_text(encoding="utf-8"),
    "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    "plop_ext.score": str(plop_ext.score.__doc__),
}


@pytest.mark.parametrize("place", LISTS)
def test_the_list_of_families_is_that_of_the_code(place: str) -> None:
    assert family_titles() in " ".join(LISTS[place].split())


def test_every_family_has_a_model_to_test() -> None:
    built = {name.split("_")[0] for name in fast_models.FAMILIES}
    assert built == {family.name.lower() for family in FAMILIES}
