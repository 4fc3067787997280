"""How many samples the choice needs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from plop_ext.report.figures import style
from plop_ext.report.figures.drawing import Drawing
from plop_ext.statistics.curve import CurvePoint, stability_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plop_ext.scores import Scores

# The share from which a choice counts as the same, as for an early stop.
_ENOUGH = 0.99
# Lines that stay above this look flat.
_FLAT = 0.97


def drawing(scores: Scores, k: int) -> Drawing | None:
    """Return the figure; None if any number of samples gives the same choice and order: both lines are flat."""
    points = stability_curve(scores.table, k)
    if _lowest(points) >= _FLAT:
        return None
    enough = next((point.samples for point in points if point.same_set >= _ENOUGH), None)
    needed = f"is reached with {enough} samples" if enough is not None else "is not reached"
    return Drawing(
        "stability",
        "Samples that the choice needs",
        "Resampled from the samples scored. The dotted line is at 99 %.",
        f"The same {k} lowest types in 99 % of the resamples: this {needed}.",
        partial(stability, points, k, scores.provenance.get("stop")),
    )


def stability(points: tuple[CurvePoint, ...], k: int, stop: Mapping[str, Any] | None, width: float) -> Figure:
    """Draw the stability of the k lowest types, and of the order of all types, over the number of samples."""
    sizes = [point.samples for point in points]
    wide = width >= style.WIDE
    figure = style.figure_of(width, 2.9 if wide else 3.4)
    axes = figure.subplots()
    axes.axhline(_ENOUGH, color=style.GRID, linewidth=0.9, linestyle=":")
    for values, color, label in (
        ([point.same_set for point in points], style.CHOSEN, f"same {k} lowest types as all samples"),
        ([point.tau for point in points], style.PALETTE[0], "Kendall's tau with the order of all"),
    ):
        axes.plot(sizes, values, color=color, label=label, marker="o", markersize=4, linewidth=1.8)
    if stop and stop["settled"]:
        axes.axvline(stop["settled_at"], color=style.PALETTE[1], linewidth=1.2, linestyle="--", label="early stop")
    axes.set_xscale("log", base=2)
    shown = sizes if wide else sizes[:: -(-len(sizes) // 6)]
    axes.set_xticks(shown, [str(size) for size in shown])
    axes.minorticks_off()
    axes.set_xlabel("samples")
    lowest = _lowest(points)
    axes.set_ylim(min(0.0 if lowest < 0.5 else 0.5, lowest - 0.05), 1.03)
    if wide:
        axes.legend(loc="lower left", fontsize=8, labelcolor=style.INK)
    else:
        figure.legend(loc="outside lower center", fontsize=8, labelcolor=style.INK)
    return figure


def _lowest(points: tuple[CurvePoint, ...]) -> float:
    # Tau is NaN where no resample has tokens of every type.
    return float(np.nanmin([(point.same_set, point.tau) for point in points]))
