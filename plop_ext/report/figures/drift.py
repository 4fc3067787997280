"""NFN of each type over the steps of a training."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from plop_ext.report.figures import style
from plop_ext.report.figures.drawing import Drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plop_ext.scores import Scores


def drawing(scores: Scores, chosen: Collection[str]) -> Drawing | None:
    """Return the figure; None for scores that no training recorded, or that it recorded once."""
    training = scores.provenance.get("training") or {}
    records: Sequence[Any] = training.get("drift") or ()
    if len(records) < 2:
        return None
    types = [label for label in style.shown_types(scores.types) if any(label in record["nfn"] for record in records)]
    first, last = records[0], records[-1]
    moved = max(
        (label for label in types if label in first["nfn"] and label in last["nfn"]),
        key=lambda label: abs(last["nfn"][label] / first["nfn"][label] - 1),
        default=None,
    )
    description = f"NFN by type from step {first['step']} to step {last['step']}."
    if moved is not None:
        change = 100 * (last["nfn"][moved] / first["nfn"][moved] - 1)
        description += f" {moved} changed most, by {change:+.1f} %."
    return Drawing(
        "drift",
        "NFN while training",
        f"The weight that is scored is {training['weight']}: its inputs move. Types chosen for LoRA are bold.",
        description,
        partial(drift, records, types, frozenset(chosen)),
    )


def drift(records: Sequence[Mapping[str, Any]], types: Sequence[str], chosen: Collection[str], width: float) -> Figure:
    """Draw a line per type over the steps."""
    wide = width >= style.WIDE
    figure = style.figure_of(width, 3.2 if wide else 4.2)
    axes = figure.subplots()
    for number, label in enumerate(types):
        points = [(record["step"], record["nfn"][label]) for record in records if label in record["nfn"]]
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=style.PALETTE[number % len(style.PALETTE)],
            linestyle=("-", "--", ":", "-.")[number // len(style.PALETTE) % 4],
            linewidth=2.6 if label in chosen else 1.2,
            label=style.shortened(label, width),
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("NFN")
    where = "outside right upper" if wide else "outside lower center"
    figure.legend(loc=where, fontsize=8, labelcolor=style.INK, ncols=1 if wide else 2)
    return figure
