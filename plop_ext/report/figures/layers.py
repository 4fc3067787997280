"""NFN over the depth of the model."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from plop_ext.report.figures import style
from plop_ext.report.figures.drawing import Drawing
from plop_ext.score_data.grid import layer_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plop_ext.scores import Scores

_STYLES = ("-", "--", ":", "-.")


def drawing(scores: Scores, chosen: Collection[str]) -> Drawing | None:
    """Return the figure; None for a model of one layer, which has no depth."""
    types = style.shown_types(scores.types)
    layers, grid = layer_grid(scores, types)
    if len(layers) < 2:
        return None
    first, last = (_mean(grid[row]) for row in (0, -1))
    return Drawing(
        "layers",
        "NFN over the depth of the model",
        "One line per type, thick for the chosen types. The first layer often differs from all others.",
        f"The mean over the types is {first:.2f} in layer {layers[0]} and {last:.2f} in layer {layers[-1]}.",
        partial(layer_lines, scores, chosen),
    )


def layer_lines(scores: Scores, chosen: Collection[str], width: float) -> Figure:
    """Draw NFN over the layers, one line per type, with thick lines for the chosen types."""
    types = style.shown_types(scores.types)
    found, grid = layer_grid(scores, types)
    wide = width >= style.WIDE
    named = types if len(types) <= 3 * len(style.PALETTE) else [label for label in types if label in chosen]
    figure = style.figure_of(width, 3.6 if wide else 3.0 + 0.2 * -(-len(named) // 2))
    axes = figure.subplots()
    style.line_at_one(axes.axhline)
    for column, label in enumerate(types):
        known = np.isfinite(grid[:, column])
        axes.plot(
            np.flatnonzero(known),
            grid[known, column],
            color=style.PALETTE[column % len(style.PALETTE)],
            linestyle=_STYLES[column // len(style.PALETTE) % len(_STYLES)],
            linewidth=2.4 if label in chosen else 1.2,
            marker="o" if len(found) <= 16 else None,
            markersize=4,
            label=style.shortened(label, width) if label in named else "_",
        )
    axes.set_yscale("log")
    style.nfn_ticks(axes.yaxis, grid[np.isfinite(grid)], style.WIDE)
    axes.set_ylabel("NFN")
    style.layer_ticks(axes, found, width)
    if named and wide:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, labelcolor=style.INK)
    elif named:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, labelcolor=style.INK)
    return figure


def _mean(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return float(values[np.isfinite(values)].mean())
