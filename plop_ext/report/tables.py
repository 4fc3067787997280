"""Terminal tables of scores, placements and comparisons, as rich renderables."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from plop_ext.finetuning.comparison import Comparison
    from plop_ext.placement import Placement
    from plop_ext.scores import Scores

_BAR_WIDTH = 24


def scores_table(scores: Scores, chosen: Collection[str] = ()) -> Table:
    """NFN by module type, lowest first.

    Args:
        scores: What to show.
        chosen: Types to mark as chosen for LoRA.
    """
    by_type = scores.by_type()
    data = scores.provenance["data"]
    name = f" on {data['name']}" if data["name"] else ""
    table = Table(
        title=f"NFN by module type: {scores.provenance['model']['class']}{name}",
        caption=f"{data['samples']} samples, {scores.tokens} tokens; 1 = the module sees its input as noise",
    )
    table.add_column("type")
    table.add_column("NFN", justify="right")
    table.add_column("", min_width=_BAR_WIDTH)
    table.add_column("lowest", justify="right")
    table.add_column("highest", justify="right")
    table.add_column("modules", justify="right")
    table.add_column("LoRA")
    largest = max(score.nfn for score in by_type)
    for score in by_type:
        mark = "yes" if score.type in chosen else ""
        table.add_row(
            score.type,
            f"{score.nfn:.3f}",
            _bar(score.nfn / largest),
            f"{score.lowest:.3f}",
            f"{score.highest:.3f}",
            str(score.modules),
            mark,
            style="bold" if mark else None,
        )
    return table


def unscored_lines(scores: Scores) -> list[str]:
    """One line per reason why modules have no score."""
    reasons: dict[str, list[str]] = {}
    for item in scores.unscored:
        reasons.setdefault(item.reason, []).append(f"{item.name} ({item.layer_class})")
    return [
        f"not scored, {reason}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for reason, names in reasons.items()
    ]


def placement_lines(placement: Placement, r: int = 16) -> list[str]:
    """What was chosen, and what it costs at rank `r`."""
    return [
        f"{placement.label}: LoRA on {', '.join(placement.types)} ({len(placement.modules)} modules)",
        f"{placement.num_parameters(r):,} trainable parameters at r={r}",
        *placement.notes,
    ]


def comparison_table(comparison: Comparison) -> Table:
    """Held-out loss of each placement at equal trainable parameters, best first."""
    seeds = len(comparison.seeds)
    table = Table(
        title=f"Held-out loss at equal trainable parameters ({comparison.loss_before:.4f} without an adapter)",
        caption=f"mean and standard deviation over {seeds} seeds; difference paired by seed; "
        "* best learning rate is at the edge of the grid",
    )
    columns = ("placement", "types", "r", "parameters", "rate", "loss", "against all-linear", "s/step", "diverged")
    for column in columns:
        table.add_column(column, justify="left" if column in ("placement", "types") else "right")
    for row in sorted(comparison.rows, key=lambda row: math.inf if math.isnan(row.loss_mean) else row.loss_mean):
        reference = row is comparison.reference
        table.add_row(
            row.label,
            ", ".join(row.types),
            str(row.r),
            f"{row.params:,}",
            f"{row.learning_rate:g}{'*' if row.lr_at_edge else ''}",
            _with_spread(row.loss_mean, row.loss_std),
            "" if reference else _with_spread(row.difference_mean, row.difference_std, sign="+"),
            f"{row.seconds_per_step:.3f}",
            f"{row.diverged}/{seeds}" if row.diverged else "",
        )
    return table


def _bar(fraction: float) -> Text:
    return Text("█" * max(1, round(fraction * _BAR_WIDTH)), style="cyan")


def _with_spread(mean: float, std: float, sign: str = "") -> str:
    spread = "" if math.isnan(std) else f" ± {std:.4f}"
    return f"{mean:{sign}.4f}{spread}"
