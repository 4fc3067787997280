"""`Totals`: the array of the kernels, its fields by name, and that nothing else knows their order."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import plop_ext
from plop_ext import Scores
from plop_ext.totals import TOTALS_FIELDS, Totals
from tests.support.gain_tables import scores, table
from tests.support.paths import ROOT
from tests.support.totals import make_totals

PACKAGE = Path(plop_ext.__file__).parent
HEADER = ROOT / "csrc" / "gain_totals.h"


def example() -> Totals:
    return Totals(np.arange(2 * 3 * 5, dtype=np.float64).reshape(2, 3, 5))


@pytest.mark.parametrize("index, name", list(enumerate(TOTALS_FIELDS)))
def test_a_field_is_a_view_of_its_column(index: int, name: str) -> None:
    totals = example()
    field = getattr(totals, name)
    assert np.shares_memory(field, totals.values)
    np.testing.assert_array_equal(field, totals.values[:, :, index])
    np.testing.assert_array_equal(totals.fields()[name], field)


def test_totals_are_joined_and_selected_by_module_and_by_sample() -> None:
    totals = example()
    first, rest = totals.of_samples([0]), totals.of_samples(slice(1, None))
    np.testing.assert_array_equal(Totals.join_samples([first, rest]), totals)
    np.testing.assert_array_equal(
        Totals.join_modules([totals.of_modules([1]), totals.of_modules([0])]), totals.values[::-1]
    )
    np.testing.assert_array_equal(Totals.from_fields(totals.fields()), totals)
    np.testing.assert_array_equal(totals.sum_samples(), totals.values.sum(axis=1))
    assert totals.seen[0].tolist() == [2 + 3 + 4, 7 + 8 + 9, 12 + 13 + 14]


def test_a_mean_gain_without_tokens_is_nan_and_nothing_is_divided_by_zero() -> None:
    totals = make_totals(2, 2, sum_gain=[[5.0, 3.0], [0.0, 0.5]], tokens=[[2.0, 1.0], [0.0, 1.0]])
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(totals.mean_gain, [[2.5, 3.0], [np.nan, 0.5]])


def test_numpy_reads_the_totals_as_their_array() -> None:
    totals = example()
    assert np.shares_memory(np.asarray(totals), totals.values)
    assert not np.shares_memory(np.array(totals), totals.values)
    assert totals.__array__(np.float32).dtype == np.float32
    np.testing.assert_array_equal(np.array(totals), totals.values)


def test_an_array_with_other_fields_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^totals must have 5 fields, got 4$"):
        Totals(np.zeros((2, 3, 4)))


def test_the_kernels_have_the_fields_in_the_same_order() -> None:
    text = HEADER.read_text()
    (names,) = re.findall(r"enum TotalsField \{([^}]*)\}", text)
    *fields, count = re.findall(r"k(\w+)", names)
    assert count == "TotalsFields"
    assert [field.lower() for field in fields] == [name.replace("_", "") for name in TOTALS_FIELDS]


def bare_indices(path: Path) -> Iterator[str]:
    """Subscripts of totals by a number in the place of the field."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Subscript) and re.search(r"totals|counts|sums\b", ast.unparse(node.value)):
            places = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
            last = places[-1] if len(places) > 1 else None
            bounds = [last.lower, last.upper] if isinstance(last, ast.Slice) else [last]
            if any(isinstance(bound, ast.Constant) and isinstance(bound.value, int) for bound in bounds):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"


def test_no_field_is_read_by_its_number() -> None:
    found = [line for path in sorted(PACKAGE.rglob("*.py")) for line in bare_indices(path)]
    assert not found


def test_a_further_field_needs_no_change_but_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = scores(table([1.0, 0.5, 2.0], layers=2, samples=4))
    expected = known.nfn, known.per_sample().nfn_std, known.types
    for module in [module for name, module in sys.modules.items() if name.startswith("plop_ext")]:
        if "TOTALS_FIELDS" in vars(module):
            monkeypatch.setattr(module, "TOTALS_FIELDS", (*TOTALS_FIELDS, "sum_energy"))
    values = np.concatenate([known.totals.values, np.full((*known.totals.values.shape[:2], 1), 7.0)], axis=2)
    wider = replace(known, totals=Totals(values))
    for found in (wider, Scores.merge([wider])):
        found.save(tmp_path / "scores.json")
        loaded = Scores.load(tmp_path / "scores.json")
        assert (loaded.totals.fields()["sum_energy"] == 7).all()
        np.testing.assert_array_equal(loaded.nfn, expected[0])
        np.testing.assert_array_equal(loaded.per_sample().nfn_std, expected[1])
        assert loaded.types == expected[2]
