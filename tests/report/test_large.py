"""Reports of models with many modules, many types and unusual names."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from plop_ext.cli.main import main
from plop_ext.report.figures import drawings, style
from plop_ext.report.module_rows import MOST_ROWS, module_rows
from plop_ext.report.plots import save_drawings
from plop_ext.scores import Scores
from plop_ext.statistics import GainTable
from tests.support.gain_tables import scores


def experts(types: int, layers: int, each: int, samples: int = 2) -> Scores:
    """`types` types in each of `layers` layers, `each` modules of each."""
    places = [(f"type_{t:04}", layer) for t in range(types) for layer in range(layers) for _ in range(each)]
    rng = np.random.default_rng(0)
    level = np.repeat(np.linspace(0.5, 3.0, types), layers * each)
    gains = level[:, None] * (1 + 0.05 * rng.standard_normal((len(places), samples)))
    tokens = np.full((len(places), samples), 50.0)
    made = GainTable.make(
        gains * tokens,
        tokens,
        np.ones(len(places)),
        np.full(len(places), 4096.0),
        [label for label, _ in places],
        [layer for _, layer in places],
    )
    return scores(made)


@pytest.mark.parametrize("each", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_page_of_50000_modules_is_small(each: int, tmp_path: Path) -> None:
    experts(20, 50, each).save(tmp_path / "s.json")
    assert main(["report", str(tmp_path / "s.json"), "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert len(page) < 5e6
    assert f"All {1000 * each:,} modules by type and layer" in page and "type_0003, layer 7" in page


def test_rows_are_modules_where_these_are_few() -> None:
    found = experts(3, 2, 2)
    what, rows = module_rows(found, {"type_0000"})
    assert what == "All 12 modules" and len(rows) == 12 and all(row.modules == 1 for row in rows)
    assert [row.nfn for row in rows] == sorted(found.nfn) and [row.chosen for row in rows] == [True] * 4 + [False] * 8


def test_rows_are_types_and_layers_where_modules_are_many() -> None:
    found = experts(4, 5, MOST_ROWS // 20 + 1)
    what, rows = module_rows(found, ())
    assert what == f"All {len(found.modules):,} modules by type and layer" and len(rows) == 20
    row = next(row for row in rows if row.name == "type_0002, layer 3")
    inside = [
        value
        for module, value in zip(found.modules, found.nfn, strict=True)
        if (module.type, module.layer) == ("type_0002", 3)
    ]
    assert row.modules == len(inside) and row.nfn == pytest.approx(np.mean(inside))
    assert (row.lowest, row.highest) == (min(inside), max(inside))


def test_only_the_lowest_rows_are_listed_where_even_these_are_many() -> None:
    what, rows = module_rows(experts(MOST_ROWS // 4, 5, 1), ())
    assert len(rows) == MOST_ROWS and what.startswith(f"The {MOST_ROWS:,} lowest of ")
    assert [row.nfn for row in rows] == sorted(row.nfn for row in rows)


def test_figures_leave_out_types_that_have_no_room(tmp_path: Path) -> None:
    found = experts(style.MOST_TYPES + 5, 2, 1)
    save_drawings(drawings(found, (), found.statistics()), tmp_path)
    for name in ("heatmap", "intervals"):
        drawn = (tmp_path / f"{name}.svg").read_text()
        assert ">5 more types have a higher NFN<" in drawn
        assert ">type_0039<" in drawn and ">type_0040<" not in drawn


def test_long_names_and_any_script_leave_room_for_the_figure(tmp_path: Path) -> None:
    found = experts(2, 2, 1)
    names = {"type_0000": "層の名前", "type_0001": "encoder_" + "x" * 80 + "_$out$"}
    modules = tuple(type(item)(**{**vars(item), "type": names[item.type]}) for item in found.modules)
    renamed = Scores(modules, found.totals, found.sample_ids.copy(), found.sample_batches.copy(), (), found.provenance)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_drawings(drawings(renamed, (), renamed.statistics()), tmp_path)
    drawn = (tmp_path / "heatmap.svg").read_text()
    assert "層の名前" in drawn and "encoder_xxxxxx…xxxxxxxxx_$out$" in drawn
    assert style.shortened("x" * 30, style.WIDE) == "x" * 30 and len(style.shortened("x" * 31, style.WIDE)) == 30
    assert len(style.shortened("x" * 31, style.NARROW)) == 16
