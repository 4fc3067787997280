"""The finalists of an experiment against its reference."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from plop_ext.report.figures import style
from plop_ext.report.figures.drawing import Drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plop_ext.experiment.result import Comparison


def drawing(comparison: Comparison) -> Drawing | None:
    """Return the figure, or None if nothing was compared."""
    compared = [row for row in comparison.rows if row.difference is not None]
    if not compared:
        return None
    found = [f"{row.label} {row.difference.mean:+.4f}" for row in compared if row.difference is not None]
    return Drawing(
        "differences",
        f"Test loss against {comparison.reference}",
        f"Test loss minus that of {comparison.reference}, in nats per token: left of 0 is better. Line: interval;"
        f" ticks: single seeds; band: the margin of {comparison.verdict.margin:g}, within which a difference is none.",
        f"Differences in nats per token: {', '.join(found)}.",
        partial(differences, comparison),
    )


def differences(comparison: Comparison, width: float) -> Figure:
    """Draw each finalist's difference from the reference, with its interval, its seeds and the margin."""
    rows = [row for row in comparison.rows if row.difference is not None]
    margin = comparison.verdict.margin
    figure = style.figure_of(width, 1.1 + 0.44 * max(1, len(rows)))
    axes = figure.subplots()
    axes.axvspan(-margin, margin, color=style.GRID, alpha=0.25, linewidth=0)
    axes.axvline(0.0, color=style.GRID, linewidth=0.9, linestyle=":")
    home = None if comparison.reference is None else comparison.row(comparison.reference)
    for position, row in enumerate(rows):
        assert row.difference is not None and home is not None
        color = style.CHOSEN if row.label == comparison.verdict.winner else style.PLAIN
        by_seed = [loss - other for loss, other in zip(row.losses, home.losses, strict=True)]
        axes.plot(by_seed, [position + 0.26] * len(by_seed), "|", color=color, alpha=0.6, markersize=7)
        axes.plot([row.difference.low, row.difference.high], [position, position], color=color, linewidth=3)
        axes.plot([row.difference.mean], [position], "o", color=color, markeredgecolor=style.INK, markersize=6)
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    style.type_ticks(axes, [row.label for row in rows], [comparison.verdict.winner or ""], width)
    axes.set_xlabel("difference in test loss, nats per token")
    return figure
