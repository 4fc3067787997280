"""NFN of each type with its uncertainty."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from plop_ext.report.figures import style
from plop_ext.report.figures.drawing import Drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plop_ext.scores import Scores
    from plop_ext.statistics.summary import Statistics

# Ticks of a type with more modules, such as experts, are one per layer.
_MOST_TICKS = 200


def drawing(scores: Scores, chosen: Collection[str], statistics: Statistics) -> Drawing:
    """Return the figure; `statistics` are those of the cut that `chosen` makes."""
    first, last = statistics.types[0], statistics.types[-1]
    return Drawing(
        "intervals",
        "NFN of each type with its uncertainty",
        "Dot: mean over the modules. Thick line: 95 % interval over samples; thin line: over layers; small ticks: "
        "single modules, or layers where a type has many. Layers differ by much more than the uncertainty over the "
        "data. Two types whose thin lines overlap are still distinguishable if they change together from layer to "
        "layer.",
        f"From {first.type}, {first.nfn:.2f}, to {last.type}, {last.nfn:.2f}. The table of types has all numbers.",
        partial(intervals, scores, chosen, statistics),
    )


def intervals(scores: Scores, chosen: Collection[str], statistics: Statistics, width: float) -> Figure:
    """Draw NFN of each type with its modules, its interval over layers (thin) and over samples (thick)."""
    shown = statistics.types[: style.MOST_TYPES]
    figure = style.figure_of(width, 0.9 + 0.44 * len(shown))
    axes = figure.subplots()
    style.line_at_one(axes.axvline)
    drawn = []
    for row, item in enumerate(shown):
        color = style.CHOSEN if item.type in chosen else style.PLAIN
        values = _ticks(scores, item.type)
        drawn.append(values)
        axes.plot(values, np.full(len(values), row + 0.26), "|", color=color, alpha=0.5, markersize=6)
        if item.over_layers is not None:
            axes.plot(item.over_layers, [row, row], color=color, linewidth=1.8)
        if item.over_samples is not None:
            axes.plot(item.over_samples, [row, row], color=color, linewidth=6, solid_capstyle="butt")
        axes.plot([item.nfn], [row], "o", color=color, markersize=6, markeredgecolor=style.INK, markeredgewidth=0.8)
    if chosen and len(chosen) < len(shown):
        axes.axhline(len(chosen) - 0.5, color=style.GRID, linewidth=0.9, linestyle="--")
    axes.set_xscale("log")
    style.nfn_ticks(axes.xaxis, np.concatenate(drawn), width)
    axes.set_xlabel("NFN")
    axes.set_ylim(len(shown) - 0.5, -0.5)
    style.type_ticks(axes, [item.type for item in shown], chosen, width)
    style.say_left_out(figure, scores.types)
    return figure


def _ticks(scores: Scores, label: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the NFN of the type's modules, or of its layers if it has many modules."""
    table = scores.table
    members = np.flatnonzero(table.type_index == table.types.index(label))
    values = scores.nfn[scores.candidates[members]]
    if len(values) <= _MOST_TICKS:
        return values
    _, place = np.unique(table.layer[members], return_inverse=True)
    return np.bincount(place, weights=values) / np.bincount(place)
