"""Two score files, type by type."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from plop_ext.report.figures import style
from plop_ext.report.figures.drawing import Drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plop_ext.report.against import Against


def drawing(comparison: Against) -> Drawing:
    """Return the figure."""
    return Drawing(
        "against",
        f"{comparison.first_name} against {comparison.second_name}",
        "NFN of each type in the two score files, with 95 % intervals over samples.",
        f"{len(comparison.rows)} types; Kendall's tau between the two orders is {comparison.tau:.2f}.",
        partial(against, comparison),
    )


def against(comparison: Against, width: float) -> Figure:
    """Draw NFN of each type in two score files, with intervals over samples."""
    shown = comparison.rows[: style.MOST_TYPES]
    wide = width >= style.WIDE
    figure = style.figure_of(width, (1.1 if wide else 1.4) + 0.38 * len(shown))
    axes = figure.subplots()
    style.line_at_one(axes.axvline)
    for row, item in enumerate(shown):
        axes.plot([item.first, item.second], [row, row], color=style.GRID, linewidth=1.2)
        for value, pair, color, name in (
            (item.first, item.first_interval, style.PALETTE[0], comparison.first_name),
            (item.second, item.second_interval, style.PALETTE[1], comparison.second_name),
        ):
            if pair is not None:
                axes.plot(pair, [row, row], color=color, linewidth=6, solid_capstyle="butt")
            label = style.shortened(name, style.WIDE) if row == 0 else "_"
            axes.plot([value], [row], "o", color=color, markersize=6, label=label)
    axes.set_xscale("log")
    style.nfn_ticks(axes.xaxis, np.array([[item.first, item.second] for item in shown]), width)
    axes.set_xlabel("NFN")
    axes.set_ylim(len(shown) - 0.5, -0.5)
    style.type_ticks(axes, [item.type for item in shown], (), width)
    legend = figure.legend(loc="outside upper center", ncols=2 if wide else 1, fontsize=8, labelcolor=style.INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
    style.say_left_out(figure, [item.type for item in comparison.rows])
    return figure
