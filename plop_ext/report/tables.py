"""Terminal tables of scores, placements and comparisons, as rich renderables."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from plop_ext.score_data import no_place_lines

if TYPE_CHECKING:
    from plop_ext.experiment.result import Comparison, ComparisonRow
    from plop_ext.placement import Placement
    from plop_ext.placement.cost import Cost
    from plop_ext.report.against import Against
    from plop_ext.scores import Scores

_BAR_WIDTH = 12
_INTERVAL_COLUMNS = ("over data", "over layers", "P data", "P layers")


def scores_table(scores: Scores, chosen: Collection[str] = ()) -> Table:
    """Return NFN by module type, lowest first, with its intervals over the data and over the layers.

    Args:
        scores: The scores to show.
        chosen: Types to mark as chosen for LoRA; their number is the cut that the probabilities refer to.
    """
    by_type = scores.by_type()
    statistics = None if scores.paper_script else scores.statistics(len(chosen) or None)
    data = scores.provenance["data"]
    name = f" on {data['name']}" if data["name"] else ""
    facts = f"{data['samples']} samples, {scores.tokens} tokens; 1: the response to random inputs"
    if statistics is not None:
        facts += f"; 95 % bootstrap intervals over samples and over layers; P: among the {statistics.k} lowest"
    table = Table(title=f"NFN by module type: {scores.provenance['model']['class']}{name}", caption=facts)
    table.add_column("type")
    table.add_column("NFN", justify="right")
    table.add_column("", min_width=_BAR_WIDTH)
    for column in _INTERVAL_COLUMNS if statistics is not None else ("lowest", "highest"):
        table.add_column(column, justify="right")
    table.add_column("modules", justify="right")
    table.add_column("LoRA")
    largest = max(score.nfn for score in by_type)
    by_name = {} if statistics is None else {item.type: item for item in statistics.types}
    for score in by_type:
        if statistics is None:
            cells = [f"{score.lowest:.3f}", f"{score.highest:.3f}"]
        else:
            item = by_name[score.type]
            cells = [
                _range(item.over_samples),
                _range(item.over_layers),
                "" if item.p_samples is None else f"{item.p_samples:.2f}",
                f"{item.p_layers:.2f}",
            ]
        mark = "yes" if score.type in chosen else ""
        table.add_row(
            score.type,
            f"{score.nfn:.3f}",
            _bar(score.nfn / largest),
            *cells,
            str(score.modules),
            mark,
            style="bold" if mark else None,
        )
    empty = [""] * (len(_INTERVAL_COLUMNS) if statistics is not None else 2)
    for position, score in enumerate(scores.no_place_by_type()):
        if position == 0:
            table.add_section()
        cells = empty if statistics is not None else [f"{score.lowest:.3f}", f"{score.highest:.3f}"]
        table.add_row(score.type, f"{score.nfn:.3f}", "", *cells, str(score.modules), "no place", style="dim")
    return table


def confidence_lines(scores: Scores, k: int | None = None) -> list[str]:
    """Return the statistics in words: how much data was needed, signal, ties, Kendall's tau, automatic k.

    Args:
        scores: The scores.
        k: Cut of the ranking that ties may cross; default 3.
    """
    lines = [] if scores.nonfinite is None else [f"{scores.nonfinite}: not placed"]
    stop = scores.provenance.get("stop")
    if stop:
        of = "" if stop["available"] is None else f" of {stop['available']}"
        watched = f"{stop['types']} lowest types" if stop["modules"] is None else "lowest modules"
        held = f"the {watched} are the same in {stop['stability'] or 0:.1%} of the bootstrap resamples"
        state = f"settled after {stop['settled_at']} samples" if stop["settled"] else "not settled"
        lines.append(f"{state}: {stop['samples']}{of} samples scored, {held}")
    if scores.paper_script:
        return lines
    statistics = scores.statistics(k)
    if not statistics.signal.found:
        return [*lines, f"no signal: {statistics.signal.reason}"]
    for tie in statistics.ties:
        where = f" across the cut after {statistics.k} types" if tie.crosses_cut else ""
        lines.append(
            f"tied{where}: {tie.lower} and {tie.upper}; their order holds in {tie.over_samples:.0%} of the resamples "
            f"of samples and {tie.over_layers:.0%} of the resamples of layers"
        )
    if len(statistics.types) > 1:
        taus = [(statistics.tau_samples, "samples"), (statistics.tau_layers, "layers")]
        means = [f"{tau:.2f} over {units}" for tau, units in taus if tau is not None]
        lines.append(f"mean Kendall's tau between the type orders of two resamples: {', '.join(means)}")
    lines.append(f"automatic k is {statistics.auto.reason}")
    return lines


def left_out_lines(scores: Scores) -> list[str]:
    """Return the part of the model that was scored, and why types are no place for LoRA and modules have no score."""
    reasons: dict[str, list[str]] = {}
    for item in scores.unscored:
        reasons.setdefault(item.reason, []).append(f"{item.name} ({item.layer_class})")
    return [
        *([f"scored {scores.part}: the model that was scored lacks the others"] if scores.part else []),
        *no_place_lines(scores.no_place_by_type()),
        *(
            f"not scored, {reason}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for reason, names in reasons.items()
        ),
    ]


def placement_lines(placement: Placement, r: int | None = None) -> list[str]:
    """Return the choice and its size at rank `r`, by default the placement's own."""
    if r is None and placement.ranks:
        values = placement.ranks.values()
        rank = f"ranks {min(values)} to {max(values)}"
    else:
        rank = f"r={placement.r if r is None else r}"
    return [
        *([placement.reason] if placement.reason else []),
        f"{placement.label}: LoRA on {', '.join(placement.types)} ({len(placement.modules)} modules)",
        f"{placement.num_parameters(r):,} trainable parameters at {rank}",
        *placement.notes,
    ]


def cost_line(cost: Cost) -> str:
    """Return the memory that training adds."""
    parts = {
        "adapters": cost.parameter_bytes,
        "gradients": cost.gradient_bytes,
        "optimizer": cost.optimizer_bytes,
        "activations": cost.activation_bytes,
    }
    listed = ", ".join(f"{name} {value / 2**20:,.1f}" for name, value in parts.items())
    return f"training adds {cost.total_bytes / 2**20:,.1f} MiB: {listed}"


def cost_table(placements: Sequence[tuple[Placement, Cost | None]], step: tuple[int, int]) -> Table:
    """Return the memory that training each placement adds to that of the model itself.

    Args:
        placements: Placements with their cost, or None if it is unknown.
        step: Samples and tokens per sample of the training step whose cost is shown.
    """
    table = Table(title=f"Memory that training adds, MiB, at {step[0]} x {step[1]} tokens")
    columns = ("placement", "types", "r", "parameters", "adapters", "gradients", "Adam", "activations", "total")
    for column in columns:
        table.add_column(column, justify="left" if column in ("placement", "types") else "right")
    for placement, cost in placements:
        cells = ["unknown"] * 5
        if cost is not None:
            parts = (cost.parameter_bytes, cost.gradient_bytes, cost.optimizer_bytes, cost.activation_bytes)
            cells = [f"{value / 2**20:,.1f}" for value in (*parts, cost.total_bytes)]
        rank = "own" if placement.ranks else str(placement.r)
        parameters = f"{placement.num_parameters():,}"
        table.add_row(placement.label, ", ".join(placement.types), rank, parameters, *cells)
    return table


def against_table(comparison: Against) -> Table:
    """Return NFN by type in two score files."""
    table = Table(title=f"{comparison.first_name} against {comparison.second_name}")
    table.add_column("type")
    for column in (comparison.first_name, comparison.second_name, "ratio", "intervals disjoint"):
        table.add_column(column, justify="right")
    for row in comparison.rows:
        differs = "yes" if row.differs else ""
        table.add_row(row.type, f"{row.first:.3f}", f"{row.second:.3f}", f"{row.ratio:.3f}", differs)
    return table


def against_lines(comparison: Against) -> list[str]:
    """Return the comparison in words."""
    lines = [f"the orders of the {len(comparison.rows)} common types agree with Kendall's tau {comparison.tau:.2f}"]
    if comparison.swapped:
        lines.append(f"of the {comparison.k} lowest, these are in one only: {', '.join(comparison.swapped)}")
    else:
        lines.append(f"both have the same {comparison.k} lowest types: {', '.join(comparison.shared)}")
    for name, labels in (
        (comparison.first_name, comparison.only_first),
        (comparison.second_name, comparison.only_second),
    ):
        if labels:
            lines.append(f"only in {name}: {', '.join(labels)}")
    return lines


def comparison_table(comparison: Comparison) -> Table:
    """Return the test loss of each candidate and its difference from the reference, best first."""
    rows = ranked_rows(comparison)
    notes = [
        f"differences with simultaneous {100 * comparison.verdict.confidence:g} % intervals, paired by row and seed"
    ]
    if any(row.lr_at_edge for row in rows):
        notes.append("* best learning rate is at the edge of those that were tried")
    table = Table(
        title=f"Test loss, nats per token ({comparison.loss_before:.4f} without an adapter)", caption="; ".join(notes)
    )
    columns = ("placement", "types", "r", "parameters", "rate", "loss", "difference", "outcome", "s/step")
    for column in columns:
        table.add_column(column, justify="left" if column in ("placement", "types", "outcome") else "right")
    for row in rows:
        everything = row.strategy == "all"
        table.add_row(
            row.label,
            "all" if everything else ", ".join(row.types),
            str(row.r),
            f"{row.params:,}",
            "" if row.learning_rate is None else f"{row.learning_rate:.3g}{'*' * row.lr_at_edge}",
            _loss(row.loss_mean),
            difference_cell(row),
            row.outcome,
            "" if math.isnan(row.seconds_per_step) else f"{row.seconds_per_step:.2g}",
        )
    return table


def comparison_lines(comparison: Comparison) -> list[str]:
    """Return the verdict, and what limits it, in words."""
    lines = [comparison.verdict.sentence]
    if comparison.mismatch > 0.02:
        lines.append(
            f"the numbers of trainable parameters differ by up to {100 * comparison.mismatch:.0f} %, because ranks are"
            " whole numbers and at most the width of a module"
        )
    edge = [row.label for row in comparison.rows if row.lr_at_edge and row.losses]
    if edge:
        lines.append(f"the best rate of {', '.join(edge)} is at the edge of those tried; a better one may lie outside")
    return lines


def ranked_rows(comparison: Comparison) -> list[ComparisonRow]:
    """Return the rows of the final by test loss, then the others by validation loss."""

    def key(row: ComparisonRow) -> tuple[bool, float]:
        final = math.isfinite(row.loss_mean)
        loss = row.loss_mean if final else row.validation_loss
        return not final, loss if math.isfinite(loss) else math.inf

    return sorted(comparison.rows, key=key)


def difference_cell(row: ComparisonRow) -> str:
    """Return a difference and its interval, or nothing."""
    found = row.difference
    return "" if found is None else f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""


def _range(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.3f}-{pair[1]:.3f}"


def _bar(fraction: float) -> Text:
    return Text("█" * max(1, round(fraction * _BAR_WIDTH)), style="cyan")
