"""Pictures of scores and comparisons, drawn by matplotlib without a display and written whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plop_ext.errors import InputError
from plop_ext.files import atomic_path

if TYPE_CHECKING:
    from plop_ext.finetuning.comparison import Comparison
    from plop_ext.scores import Scores

FORMATS = (".png", ".svg", ".pdf")
# Numbers inside the cells are readable up to this many layers.
_ANNOTATED_LAYERS = 24
_CHOSEN = "#1b7f5c"
_PLAIN = "#7d8b99"


def heatmap(scores: Scores, path: str | os.PathLike[str], chosen: Collection[str] = ()) -> None:
    """Draw NFN as layers x types, types in order of their NFN, with the mean of each type above.

    Args:
        scores: What to draw.
        path: File to write; .png, .svg or .pdf.
        chosen: Types to mark as chosen for LoRA.

    Raises:
        InputError: If the extension is unknown or the file cannot be written.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    by_type = scores.by_type()
    layers, grid = _layer_grid(scores, [score.type for score in by_type])
    shown = len(layers) <= _ANNOTATED_LAYERS
    width = max(5.5, 1.1 * len(by_type) + 2.0)
    height = 2.4 + (0.42 if shown else 0.16) * max(len(layers), 4)
    figure = Figure(figsize=(width, height), layout="constrained")
    bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, height - 2.4])

    positions = np.arange(len(by_type))
    means = [score.nfn for score in by_type]
    colors = [_CHOSEN if score.type in chosen else _PLAIN for score in by_type]
    bars.bar(positions, means, width=0.7, color=colors)
    bars.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    for x, mean in zip(positions, means, strict=True):
        text = {"ha": "center", "va": "top", "fontsize": 8, "color": "white"}
        bars.annotate(f"{mean:.2f}", (x, mean), (0, -3), textcoords="offset points", **text)
    bars.set_ylabel("mean NFN")
    bars.tick_params(axis="x", length=0, labelbottom=False)
    for side in ("top", "right"):
        bars.spines[side].set_visible(False)
    data = scores.provenance["data"]
    title = f"{scores.provenance['model']['class']}, {data['samples']} samples"
    title += f" of {data['name']}" if data["name"] else ""
    bars.set_title(title + (" (green: LoRA)" if chosen else ""), fontsize=10, loc="left")

    finite = grid[np.isfinite(grid)]
    spread = max(float(np.abs(finite - 1.0).max()), 1e-3)
    low, high = max(1.0 - spread, min(float(finite.min()), 0.999)), max(float(finite.max()), 1.001)
    norm = TwoSlopeNorm(vmin=min(low, 0.999), vcenter=1.0, vmax=high)
    picture = cells.imshow(np.ma.masked_invalid(grid), cmap="RdBu_r", norm=norm, aspect="auto")
    if shown:
        _annotate(cells, grid, norm)
    cells.set_xticks(positions, [score.type for score in by_type], rotation=30, ha="right", rotation_mode="anchor")
    for label, score in zip(cells.get_xticklabels(), by_type, strict=True):
        if score.type in chosen:
            label.set_color(_CHOSEN)
            label.set_fontweight("bold")
    step = max(1, math.ceil(len(layers) / 32))
    cells.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    cells.set_ylabel("layer")
    figure.colorbar(picture, ax=cells, label="NFN", pad=0.02)
    _save(figure, path)


def comparison_plot(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Draw the held-out loss of each placement: a dot per seed, a line at their mean, against all-linear.

    Args:
        comparison: What to draw.
        path: File to write; .png, .svg or .pdf.

    Raises:
        InputError: If the extension is unknown or the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = sorted(comparison.rows, key=lambda row: math.inf if math.isnan(row.loss_mean) else row.loss_mean)
    reference = comparison.reference
    figure = Figure(figsize=(7.0, 1.4 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for position, row in enumerate(rows):
        color = "black" if row is reference else _CHOSEN if row.strategy == "lowest" else _PLAIN
        losses = [loss for loss in row.losses if math.isfinite(loss)]
        axes.plot(losses, [position] * len(losses), "o", color=color, alpha=0.55, markersize=6)
        if losses:
            axes.plot([np.mean(losses)] * 2, [position - 0.3, position + 0.3], color=color, linewidth=2)
    if math.isfinite(reference.loss_mean):
        axes.axvline(reference.loss_mean, color="black", linewidth=0.8, linestyle=":")
    labels = [f"{row.label}  r={row.r}, {row.params:,} parameters" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss, nats per token (dot: one seed; bar: mean)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, path)


def _layer_grid(scores: Scores, types: list[str]) -> tuple[list[int | str], np.ndarray[Any, Any]]:
    """[layers, types] mean NFN; NaN where a layer has no module of a type. Modules outside blocks get a last row."""
    indexed = sorted({module.layer for module in scores.modules if module.layer is not None})
    layers: list[int | str] = list(indexed)
    if any(module.layer is None for module in scores.modules):
        layers.append("-")
    sums, counts = np.zeros((len(layers), len(types))), np.zeros((len(layers), len(types)))
    for module, value in zip(scores.modules, scores.nfn, strict=True):
        row = layers.index("-" if module.layer is None else module.layer)
        for column, label in enumerate(types):
            if module.type == label or (scores.paper_script and label in module.name):
                sums[row, column] += value
                counts[row, column] += 1
    return layers, np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _annotate(axes: Any, grid: np.ndarray[Any, Any], norm: Any) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            dark = abs(float(norm(value)) - 0.5) > 0.3
            text = f"{value:.2f}" if value < 100 else f"{value:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"`{path}`: cannot draw a {suffix or 'file without extension'}; use {', '.join(FORMATS)}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=suffix.removeprefix("."), dpi=150)
