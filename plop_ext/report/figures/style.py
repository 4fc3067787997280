"""What all figures share: colours, sizes, labels and ticks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A page replaces these two colours by its own, which follow the reader's colour scheme.
INK = "#1f2429"
CHOSEN = "#12795b"
GRID = "#8b949e"
PLAIN = "#6f8296"
PALETTE = ("#3b82c4", "#e07b39", "#2f9e6e", "#c2548e", "#8a6fd1", "#b08d1f", "#4aa8c0", "#9a5b3c")
# Inches. A page of 62 rem shows the wide figures at about their size, a telephone of 390 pixels the narrow ones.
WIDE = 9.0
NARROW = 4.2
# A figure has room for this many types; tables and the scores file have all.
MOST_TYPES = 40


def settings() -> dict[str, Any]:
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
        # Names of types and files are no formulas, also where the user's own settings read formulas.
        "text.parse_math": False,
        "text.usetex": False,
    }


def figure_of(width: float, height: float) -> Figure:
    """Make an empty figure, sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def shortened(label: str, width: float) -> str:
    """Return a label that leaves room for the figure: its middle is cut out, since names differ at both ends."""
    most = 30 if width >= WIDE else 16
    if len(label) <= most:
        return label
    head = (most - 1) // 2
    return f"{label[:head]}…{label[-(most - 1 - head) :]}"


def shown_types(types: Sequence[str]) -> list[str]:
    """Return the types that a figure has room for, lowest NFN first."""
    return list(types[:MOST_TYPES])


def say_left_out(figure: Figure, types: Sequence[str]) -> None:
    """Write below the figure how many types it leaves out."""
    if len(types) > MOST_TYPES:
        figure.supxlabel(f"{len(types) - MOST_TYPES:,} more types have a higher NFN", fontsize=8)


def type_ticks(axes: Any, types: Sequence[str], chosen: Collection[str], width: float) -> None:
    """Label the rows with the types; those chosen for LoRA are bold and green."""
    axes.set_yticks(range(len(types)), [shortened(name, width) for name in types])
    for label, name in zip(axes.get_yticklabels(), types, strict=True):
        if name in chosen:
            label.set_color(CHOSEN)
            label.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)


def layer_ticks(axes: Any, layers: Sequence[int | str], width: float) -> None:
    """Label the columns with the layers, as many as have room."""
    step = max(1, -(-len(layers) // (20 if width >= WIDE else 9)))
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")


def nfn_ticks(axis: Any, values: np.ndarray[Any, Any], width: float) -> None:
    """Set ticks at round numbers of a logarithmic axis, as many as the range needs."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    fine = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3)
    coarse = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 100)
    ticks = [tick for tick in (fine if high / low < 2.2 else coarse) if low / 1.05 <= tick <= high * 1.05]
    if high / low < 1.3:
        ticks = [float(tick) for tick in MaxNLocator(6).tick_values(low, high)]
    most = 12 if width >= WIDE else 6
    ticks = ticks[:: -(-len(ticks) // most)] if ticks else ticks
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def line_at_one(line: Any) -> None:
    """Draw NFN 1 with `axvline` or `axhline`."""
    line(1.0, color=GRID, linewidth=0.9, linestyle=":")
