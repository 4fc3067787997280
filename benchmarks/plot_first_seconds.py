"""Draws what `benchmarks.first_seconds` saw of the command: a lane per span, and the bytes read, in each case.

python -m benchmarks.plot_first_seconds benchmarks/results/first_seconds.json --output docs/first_seconds.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.markdown import Result
from benchmarks.plotting import draw
from plop_ext.report.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LANES = ("import", "load", "data", "score", "stream", "write")


def figure(result: Result) -> Figure:
    """Return a panel per case: time from the start of the process."""
    from matplotlib.figure import Figure

    timelines: dict[str, dict[str, Any]] = result["settings"]["timelines"]
    drawn = Figure(figsize=(8, 0.4 + 1.9 * len(timelines)), layout="constrained")
    panels = drawn.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, found) in zip(panels, timelines.items(), strict=True):
        _panel(axes, found)
        axes.set_title(name, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
    panels[-1].set_xlabel("seconds since the process was started; line: share of the bytes read", fontsize=8)
    return drawn


def _panel(axes: Axes, found: dict[str, Any]) -> None:
    for name, start, end in found["spans"]:
        lane = LANES.index(name.partition(" ")[0])
        color = style.PLAIN if lane == 0 else style.CHOSEN
        axes.barh(lane, end - start, left=start, height=0.7, color=color, edgecolor="white", linewidth=0.5)
    times, sizes = zip(*found["read"], strict=True)
    most = max(sizes) or 1
    axes.plot(times, [len(LANES) - 0.5 - len(LANES) * size / most for size in sizes], color=style.PALETTE[1], lw=1)
    axes.axvline(found["ended"], color=style.GRID, linewidth=0.8)
    axes.set_yticks(range(len(LANES)), LANES)
    axes.set_ylim(len(LANES) - 0.5, -0.5)
    axes.set_xlim(left=0)


def main(argv: Sequence[str] | None = None) -> None:
    draw(__doc__, "benchmarks.first_seconds", figure, argv)


if __name__ == "__main__":
    main()
