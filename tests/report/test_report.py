"""Tables and pictures of constructed results."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from plop_ext.errors import InputError
from plop_ext.report import plots, tables
from plop_ext.score_data.grid import layer_grid
from plop_ext.scores import Scores
from plop_ext.unscored import UnscoredModule
from tests.support.made_comparison import made_comparison
from tests.support.scored_modules import scored_module
from tests.support.totals import make_totals

TYPES = ("q_proj", "v_proj", "down_proj")


def make_scores(layers: int) -> Scores:
    """NFN of q_proj 2, v_proj 0.5, down_proj 1, the same in each layer."""
    gains = {"q_proj": 2.0, "v_proj": 0.5, "down_proj": 1.0}
    modules = tuple(
        scored_module(f"layers.{layer}.{label}", label, layer, 8, 8, 1.0, 8.0**0.5)
        for layer in range(layers)
        for label in TYPES
    )
    sums = [[10 * gains[module.type]] for module in modules]
    totals = make_totals(len(modules), 2, sum_gain=sums, tokens=10)
    provenance = {
        "model": {"class": "Toy"},
        "data": {"name": "toy", "samples": 2},
        "settings": {"compat": None},
    }
    unscored = (UnscoredModule("head", "Linear", "outside the repeated blocks"),)
    return Scores(modules, totals, np.arange(2), np.zeros(2, dtype=np.int64), unscored, provenance)


def render(renderable: object) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(renderable)
    return console.export_text()


def test_scores_table_lists_types_lowest_first_and_marks_the_chosen() -> None:
    lines = [
        line for line in render(tables.scores_table(make_scores(2), chosen=["v_proj"])).splitlines() if "proj" in line
    ]
    assert [next(label for label in TYPES if label in line) for line in lines] == ["v_proj", "down_proj", "q_proj"]
    assert "0.500" in lines[0] and "yes" in lines[0] and "yes" not in lines[1]


def test_left_out_lines_name_module_and_reason() -> None:
    assert tables.left_out_lines(make_scores(1)) == ["not scored, outside the repeated blocks: head (Linear)"]


@pytest.mark.parametrize("layers", [1, 4, 80])
def test_heatmap_is_a_picture_at_any_depth(layers: int, tmp_path: Path) -> None:
    plots.heatmap(make_scores(layers), tmp_path / "h.png", chosen=["v_proj"])
    header = (tmp_path / "h.png").read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:24])
    assert header.startswith(b"\x89PNG") and width > 500 and height > 200


def test_heatmap_as_svg_names_every_type(tmp_path: Path) -> None:
    plots.heatmap(make_scores(2), tmp_path / "h.svg")
    assert "<svg" in (tmp_path / "h.svg").read_text()


def test_unknown_picture_format_names_the_ones_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot draw a \.bmp; use \.png, \.svg, \.pdf"):
        plots.heatmap(make_scores(1), tmp_path / "h.bmp")
    assert not list(tmp_path.iterdir())


def test_layer_grid_leaves_missing_cells_empty() -> None:
    scores = make_scores(2)
    partial = Scores(
        scores.modules[:-1],
        scores.totals.of_modules(slice(-1)),
        scores.sample_ids.copy(),
        scores.sample_batches.copy(),
        (),
        scores.provenance,
    )
    layers, grid = layer_grid(partial, list(TYPES))
    assert layers == [0, 1]
    assert np.isnan(grid[1, 2]) and np.allclose(grid[0], [2.0, 0.5, 1.0])


class TestComparison:
    def test_table_has_the_best_first_and_the_dropped_last(self) -> None:
        lines = render(tables.comparison_table(made_comparison())).splitlines()
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.count("│") == 10]
        assert [row[0] for row in cells] == ["mlp", "all-linear", "lowest-3", "attention"]
        assert [row[7] for row in cells] == ["better", "reference", "not decided", "diverged"]
        assert cells[0][5:7] == ["0.7500", "-0.2500 (-0.3000 to -0.2000)"] and cells[1][6] == cells[3][6] == ""
        assert cells[2][4] == "0.001*" and cells[3][4] == ""

    def test_only_types_and_outcomes_wrap_at_120_columns(self) -> None:
        comparison = made_comparison()
        names = [f"random-4 (seed {seed})" for seed in range(6)]
        types = ("gate_proj", "down_proj", "o_proj", "v_proj")
        rows = [
            dataclasses.replace(comparison.row("mlp"), label=name, types=types, params=41_943_040, r=128)
            for name in names
        ]
        lines = render(tables.comparison_table(dataclasses.replace(comparison, rows=(*rows, comparison.rows[0]))))
        for name in names:
            [line] = [line for line in lines.splitlines() if name in line and "│" in line]
            assert "-0.2500" in line and "41,943,040" in line

    def test_limits_are_said(self) -> None:
        lines = tables.comparison_lines(dataclasses.replace(made_comparison(), mismatch=0.06))
        assert lines[0] == made_comparison().verdict.sentence
        assert "differ by up to 6 %" in lines[1] and "best rate of lowest-3 is at the edge" in lines[2]
        assert len(tables.comparison_lines(made_comparison(edge=False))) == 1

    def test_plot(self, tmp_path: Path) -> None:
        plots.comparison_plot(made_comparison(), tmp_path / "c.png")
        assert (tmp_path / "c.png").stat().st_size > 1000
