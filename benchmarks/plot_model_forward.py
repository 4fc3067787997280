"""Draws the ratios of `benchmarks.model_forward`: one panel per model and batch, a point per candidate.

python -m benchmarks.plot_model_forward benchmarks/results/model_forward.json --output docs/model_forward.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.markdown import Result
from benchmarks.overhead import BEST, OURS, PLAIN, PUBLISHED, USUAL
from benchmarks.plotting import draw
from plop_ext.report.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond this a candidate is its figure at the edge: the others would all lie on one line.
LIMIT = 1.6
_COLORS = {PLAIN: style.PLAIN, USUAL: style.PALETTE[1], BEST: style.PALETTE[1], OURS: style.CHOSEN}


def figure(result: Result) -> Figure:
    """Return a grid of models x batches, each model with what was measured of it in any batch.

    Points are medians, bars reach from the 20th to the 80th percentile.
    """
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "error" not in row and row["candidate"] not in (PLAIN, PUBLISHED)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    batches = sorted({(row["batch"], row["tokens"]) for row in rows}, key=lambda batch: (batch[0] * batch[1], batch))
    candidates = [list(dict.fromkeys(row["candidate"] for row in rows if row["model"] == model)) for model in models]
    heights = [0.5 + 0.19 * len(names) for names in candidates]
    drawn = Figure(figsize=(2.6 + 2.3 * len(batches), 0.9 + sum(heights)), layout="constrained")
    grid = drawn.subplots(
        len(models), len(batches), sharex=True, sharey="row", squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for line, model, names in zip(grid, models, candidates, strict=True):
        for axes, (batch, tokens) in zip(line, batches, strict=True):
            found = {
                row["candidate"]: row
                for row in rows
                if (row["model"], row["batch"], row["tokens"]) == (model, batch, tokens)
            }
            _panel(axes, found, names)
            axes.set_title(f"{model}, {batch} x {tokens}", fontsize=8)
            axes.tick_params(labelsize=7)
        line[0].set_yticks(range(len(names)), names)
        line[0].set_ylim(len(names) - 0.5, -0.5)
    grid[0][0].set_xlim(min([0.5, *(row["ratio_p20"] - 0.05 for row in rows)]), LIMIT)
    drawn.supxlabel("x plain eager forward of the same round (bars: 20th to 80th percentile)", fontsize=8)
    return drawn


def _panel(axes: Axes, found: dict[str, dict[str, Any]], names: Sequence[str]) -> None:
    axes.tick_params(axis="y", length=0)
    if not found:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", fontsize=7, transform=axes.transAxes)
        return
    axes.axvline(1.0, color=style.GRID, linewidth=0.8)
    for position, name in enumerate(names):
        if name not in found:
            continue
        row = found[name]
        color = next(value for key, value in reversed(_COLORS.items()) if name.startswith(key))
        if row["ratio"] > LIMIT:
            axes.text(LIMIT, position, f"{row['ratio']:.1f} >", ha="right", va="center", fontsize=7, color=color)
            continue
        axes.plot([row["ratio_p20"], row["ratio_p80"]], [position] * 2, color=color, linewidth=1.5)
        axes.plot([row["ratio"]], [position], "o", color=color, markersize=4)


def main(argv: Sequence[str] | None = None) -> None:
    draw(__doc__, "benchmarks.model_forward", figure, argv)


if __name__ == "__main__":
    main()
