"""The figures of a report, as matplotlib figures that the caller saves."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from plop_ext.report.grid import layer_grid
from plop_ext.statistics.curve import stability_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plop_ext.report.against import Against
    from plop_ext.scores import Scores

# Text and axes have one colour, which a page replaces by the colour of its text.
INK = "#1f2429"
GRID = "#8b949e"
CHOSEN = "#1a936f"
PLAIN = "#6f8296"
PALETTE = ("#3b82c4", "#e07b39", "#2f9e6e", "#c2548e", "#8a6fd1", "#b08d1f", "#4aa8c0", "#9a5b3c")
# Grey at NFN 1, which is neither the white nor the black of the page; red above, blue below.
_DIVERGING = ("#1d5fa8", "#7fb2dd", "#dde1e6", "#eda58a", "#b3362b")
# Numbers inside the cells are readable up to this many layers.
_ANNOTATED_LAYERS = 16
_WIDTH = 9.0


def style() -> dict[str, Any]:
    """Return the matplotlib settings with which the figures are drawn and saved."""
    return {
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "plop_ext",
        "legend.frameon": False,
    }


def heatmap(scores: Scores, chosen: Collection[str] = ()) -> Figure:
    """Draw NFN as types x layers, lowest type on top; colours follow log NFN, on separate scales below and above 1."""
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    types = list(scores.types)
    layers, grid = layer_grid(scores, types)
    values = np.log2(grid.T)
    figure = _figure(0.9 + 0.36 * len(types))
    axes = figure.subplots()
    # At least from 0.87 to 1.15, so that the scatter of an untrained model looks small.
    low, high = min(float(np.nanmin(values)), -0.2), max(float(np.nanmax(values)), 0.2)
    norm = TwoSlopeNorm(0.0, low, high)
    colors = LinearSegmentedColormap.from_list("nfn", _DIVERGING)
    columns, rows = np.arange(len(layers) + 1) - 0.5, np.arange(len(types) + 1) - 0.5
    # Edges in the colour of the faces: without them, viewers draw hairlines between the cells.
    mesh = axes.pcolormesh(columns, rows, np.ma.masked_invalid(values), cmap=colors, norm=norm, edgecolors="face")
    mesh.set_linewidth(0.4)
    axes.invert_yaxis()
    if len(layers) <= _ANNOTATED_LAYERS:
        for (row, column), value in np.ndenumerate(grid.T):
            if math.isfinite(value):
                strong = abs(float(norm(math.log2(value))) - 0.5) > 0.3
                # Not INK, which changes on a dark page: the cell does not.
                color = "#ffffff" if strong else "#16191d"
                axes.text(column, row, _short(value), ha="center", va="center", fontsize=8, color=color)
    _type_ticks(axes, types, chosen)
    step = max(1, math.ceil(len(layers) / 20))
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")
    _bare(axes)
    steps = (0.125, 0.25, 0.5, 0.7, 1, 1.4, 2, 4, 8, 16) if high - low > 1 else (0.5, 0.7, 0.9, 1, 1.1, 1.4)
    ticks = [value for value in steps if low <= math.log2(value) <= high]
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=14, ticks=np.log2(ticks))
    bar.ax.set_yticklabels([f"{value:g}" for value in ticks])
    bar.ax.minorticks_off()
    bar.set_label("NFN")
    bar.outline.set_visible(False)
    return figure


def intervals(scores: Scores, chosen: Collection[str] = ()) -> Figure:
    """Draw NFN of each type with its modules, its interval over layers (thin) and over samples (thick)."""
    statistics = scores.statistics(len(chosen) or None)
    table = scores.table
    nfn = scores.nfn
    figure = _figure(0.9 + 0.44 * len(statistics.types))
    axes = figure.subplots()
    axes.axvline(1.0, color=GRID, linewidth=0.9, linestyle=":")
    for row, item in enumerate(statistics.types):
        color = CHOSEN if item.type in chosen else PLAIN
        values = nfn[table.type_index == table.types.index(item.type)]
        axes.plot(values, np.full(len(values), row + 0.26), "|", color=color, alpha=0.5, markersize=6)
        if item.over_layers is not None:
            axes.plot(item.over_layers, [row, row], color=color, linewidth=1.8)
        if item.over_samples is not None:
            axes.plot(item.over_samples, [row, row], color=color, linewidth=6, solid_capstyle="butt")
        axes.plot([item.nfn], [row], "o", color=color, markersize=6, markeredgecolor=INK, markeredgewidth=0.8)
    if chosen and len(chosen) < len(statistics.types):
        axes.axhline(len(chosen) - 0.5, color=GRID, linewidth=0.9, linestyle="--")
    axes.set_xscale("log")
    _nfn_ticks(axes.xaxis, nfn)
    axes.set_xlabel("NFN: mean (dot), 95 % over samples (thick) and over layers (thin), single modules (ticks)")
    axes.set_ylim(len(statistics.types) - 0.5, -0.5)
    _type_ticks(axes, [item.type for item in statistics.types], chosen)
    return figure


def layers(scores: Scores, chosen: Collection[str] = ()) -> Figure:
    """Draw NFN over the layers, one line per type, with thick lines for the chosen types."""
    types = list(scores.types)
    found, grid = layer_grid(scores, types)
    figure = _figure(3.6)
    axes = figure.subplots()
    axes.axhline(1.0, color=GRID, linewidth=0.9, linestyle=":")
    for column, label in enumerate(types):
        known = np.isfinite(grid[:, column])
        axes.plot(
            np.flatnonzero(known),
            grid[known, column],
            color=PALETTE[column % len(PALETTE)],
            linestyle=("-", "--", ":", "-.")[column // len(PALETTE) % 4],
            linewidth=2.4 if label in chosen else 1.2,
            marker="o" if len(found) <= _ANNOTATED_LAYERS else None,
            markersize=4,
            label=label,
        )
    axes.set_yscale("log")
    _nfn_ticks(axes.yaxis, grid[np.isfinite(grid)])
    axes.set_ylabel("NFN")
    step = max(1, math.ceil(len(found) / 20))
    axes.set_xticks(range(0, len(found), step), [str(layer) for layer in found[::step]])
    axes.set_xlabel("layer")
    if len(types) <= 3 * len(PALETTE):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, labelcolor=INK)
    return figure


def stability(scores: Scores, k: int) -> Figure:
    """Draw the stability of the k lowest types, and of the order of all types, over the number of samples."""
    points = stability_curve(scores.table, k)
    sizes = [point.samples for point in points]
    figure = _figure(2.9)
    axes = figure.subplots()
    axes.axhline(0.99, color=GRID, linewidth=0.9, linestyle=":")
    for values, color, label in (
        ([point.same_set for point in points], CHOSEN, f"same {k} lowest types as all samples"),
        ([point.tau for point in points], PALETTE[0], "Kendall's tau with the order of all"),
    ):
        axes.plot(sizes, values, color=color, label=label, marker="o", markersize=4, linewidth=1.8)
    stop = scores.provenance.get("stop")
    if stop and stop["settled"]:
        axes.axvline(stop["settled_at"], color=PALETTE[1], linewidth=1.2, linestyle="--", label="early stop")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("samples (resampled from those scored)")
    lowest = min(min(p.same_set, p.tau) for p in points)
    axes.set_ylim(min(0.0 if lowest < 0.5 else 0.5, lowest - 0.05), 1.03)
    axes.legend(loc="lower left", fontsize=8, labelcolor=INK)
    return figure


def against(comparison: Against) -> Figure:
    """Draw NFN of each type in two score files, with intervals over samples."""
    figure = _figure(1.1 + 0.38 * len(comparison.rows))
    axes = figure.subplots()
    axes.axvline(1.0, color=GRID, linewidth=0.9, linestyle=":")
    for row, item in enumerate(comparison.rows):
        axes.plot([item.first, item.second], [row, row], color=GRID, linewidth=1.2)
        for value, pair, color in (
            (item.first, item.first_interval, PALETTE[0]),
            (item.second, item.second_interval, PALETTE[1]),
        ):
            if pair is not None:
                axes.plot(pair, [row, row], color=color, linewidth=6, solid_capstyle="butt")
            label = (comparison.first_name, comparison.second_name)[color == PALETTE[1]] if row == 0 else None
            axes.plot([value], [row], "o", color=color, markersize=6, label=label)
    axes.set_xscale("log")
    _nfn_ticks(axes.xaxis, np.array([[item.first, item.second] for item in comparison.rows]))
    axes.set_xlabel("NFN, with 95 % interval over samples")
    axes.set_ylim(len(comparison.rows) - 0.5, -0.5)
    _type_ticks(axes, [item.type for item in comparison.rows], ())
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, fontsize=8, labelcolor=INK)
    return figure


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _type_ticks(axes: Any, types: list[str], chosen: Collection[str]) -> None:
    axes.set_yticks(range(len(types)), types)
    for label, name in zip(axes.get_yticklabels(), types, strict=True):
        if name in chosen:
            label.set_color(CHOSEN)
            label.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)


def _bare(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def _nfn_ticks(axis: Any, values: np.ndarray[Any, Any]) -> None:
    """Set ticks at round numbers of a logarithmic axis, as many as the range needs."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = float(np.min(values)), float(np.max(values))
    fine = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3)
    coarse = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 100)
    ticks = [tick for tick in (fine if high / low < 2.2 else coarse) if low / 1.05 <= tick <= high * 1.05]
    if high / low < 1.3:
        ticks = [float(tick) for tick in MaxNLocator(6).tick_values(low, high)]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
