"""NFN as types x layers."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from plop_ext.report.figures import style
from plop_ext.report.figures.drawing import Drawing
from plop_ext.score_data.grid import layer_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plop_ext.scores import Scores

# Grey at NFN 1, which is neither the white nor the black of the page; red above, blue below.
_DIVERGING = ("#1d5fa8", "#7fb2dd", "#dde1e6", "#eda58a", "#b3362b")
# Numbers inside the cells are readable up to this many layers.
_NUMBERED = {style.WIDE: 16, style.NARROW: 6}
# Above this, the cells are one image: as paths they would be megabytes.
_MOST_PATHS = 2000


def drawing(scores: Scores, chosen: Collection[str]) -> Drawing:
    """Return the heatmap, lowest type on top."""
    types = style.shown_types(scores.types)
    layers, grid = layer_grid(scores, types)
    filled = np.argwhere(grid > 0).tolist()
    cells = [(float(grid[row, column]), types[column], layers[row]) for row, column in filled]
    ends = [f"{value:.2f} ({label}, layer {layer})" for value, label, layer in (min(cells), max(cells))]
    return Drawing(
        "heatmap",
        "NFN by type and layer",
        "Grey: NFN 1, the response to random inputs; red: above 1; blue: below 1.",
        f"{len(types)} types by {len(layers)} layers. The lowest NFN is {ends[0]}, the highest {ends[1]}.",
        partial(heatmap, scores, chosen),
    )


def heatmap(scores: Scores, chosen: Collection[str], width: float) -> Figure:
    """Draw NFN as types x layers; colours follow log NFN, on separate scales below and above 1."""
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    types = style.shown_types(scores.types)
    layers, grid = layer_grid(scores, types)
    values = np.log2(grid.T)
    wide = width >= style.WIDE
    figure = style.figure_of(width, (0.9 if wide else 1.5) + 0.36 * len(types))
    axes = figure.subplots()
    # At least from 0.87 to 1.15, so that the scatter of an untrained model looks small.
    low, high = min(float(np.nanmin(values)), -0.2), max(float(np.nanmax(values)), 0.2)
    norm = TwoSlopeNorm(0.0, low, high)
    colors = LinearSegmentedColormap.from_list("nfn", _DIVERGING)
    columns, rows = np.arange(len(layers) + 1) - 0.5, np.arange(len(types) + 1) - 0.5
    # Edges in the colour of the faces: without them, viewers draw hairlines between the cells.
    mesh = axes.pcolormesh(columns, rows, np.ma.masked_invalid(values), cmap=colors, norm=norm, edgecolors="face")
    mesh.set_linewidth(0.4)
    mesh.set_rasterized(values.size > _MOST_PATHS)
    axes.invert_yaxis()
    if len(layers) <= _NUMBERED[style.WIDE if wide else style.NARROW]:
        _write_numbers(axes, grid, norm)
    style.type_ticks(axes, types, chosen, width)
    style.layer_ticks(axes, layers, width)
    _bare(axes)
    steps = (0.125, 0.25, 0.5, 0.7, 1, 1.4, 2, 4, 8, 16) if high - low > 1 else (0.5, 0.7, 0.9, 1, 1.1, 1.4)
    ticks = [value for value in steps if low <= math.log2(value) <= high]
    place = {"pad": 0.015, "aspect": 14} if wide else {"location": "bottom", "aspect": 30}
    bar = figure.colorbar(mesh, ax=axes, ticks=np.log2(ticks), **place)
    bar.set_ticks(np.log2(ticks).tolist(), labels=[f"{value:g}" for value in ticks])
    bar.ax.minorticks_off()
    bar.set_label("NFN")
    bar.outline.set_visible(False)
    style.say_left_out(figure, scores.types)
    return figure


def _write_numbers(axes: Any, grid: np.ndarray[Any, Any], norm: Any) -> None:
    for (row, column), value in np.ndenumerate(grid.T):
        if math.isfinite(value):
            strong = abs(float(norm(math.log2(value))) - 0.5) > 0.3
            # Not INK, which changes on a dark page: the cell does not.
            color = "#ffffff" if strong else "#16191d"
            number = f"{value:.2f}" if value < 10 else f"{value:.0f}"
            axes.text(column, row, number, ha="center", va="center", fontsize=8, color=color)


def _bare(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
