"""What a reader of scores should do, in words that the terminal and the page share."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plop_ext.statistics import DEFAULT_TYPES

if TYPE_CHECKING:
    from plop_ext.placement import Placement
    from plop_ext.placement.cost import Cost
    from plop_ext.scores import Scores
    from plop_ext.statistics.summary import Statistics

_LISTED = 8


@dataclass(frozen=True)
class Recommendation:
    """The choice, its cost and certainty, and the commands that follow.

    Attributes:
        placed: Whether the scores support a placement.
        headline: The choice in one sentence.
        lines: Cost, certainty, number of types and what the choice does not say, a sentence each.
        commands: Command lines to copy, in order.
    """

    placed: bool
    headline: str
    lines: tuple[str, ...]
    commands: tuple[str, ...]


def recommend(
    scores: Scores,
    placements: Sequence[tuple[Placement, Cost | None]],
    statistics: Statistics | None,
    *,
    path: str,
) -> Recommendation:
    """Put a placement into words.

    Args:
        scores: The scores.
        placements: The recommended placement first, and all-linear last, each with its cost, or None if unknown;
            empty if the scores carry no signal, or the model is broken.
        statistics: The certainty of the ranking at the cut of the recommended placement; None for scores that have no
            statistics.
        path: File of the scores, as the commands name it.
    """
    if scores.nonfinite is not None:
        return Recommendation(
            False,
            f"No placement is recommended, because the model is broken: {scores.nonfinite}.",
            ("Mend the checkpoint, or score with another --dtype if 16-bit activations overflow.",),
            (f"plop score {_model(scores)} {_data(scores)} -o {shlex.quote(path)} --force --dtype float32",),
        )
    if not placements:
        reason = "" if statistics is None else f": {statistics.signal.reason}"
        return Recommendation(
            False,
            f"No placement is recommended, because the ranking carries no signal{reason}.",
            ("Check that the trained checkpoint was loaded, and score more samples of the task.",),
            (f"plop score {_model(scores)} {_data(scores)} -o {shlex.quote(path)} --force",),
        )
    placement, cost = placements[0]
    chosen = len(placement.types)
    lines = [_cost_sentence(placement, cost, placements[-1])]
    if statistics is not None and chosen < len(statistics.types):
        lines += [_certainty_sentence(statistics), _number_sentence(statistics, chosen)]
    elif statistics is not None:
        lines.append("All types are chosen, so the choice does not depend on the ranking.")
    lines.append(
        "The scores rank where LoRA might go; whether this trains better than LoRA on all linear layers depends on "
        "model and task, and the last command measures it."
    )
    place = f"plop place {shlex.quote(path)} -o placement.json"
    if chosen != min(DEFAULT_TYPES, len(scores.types)):
        place += f" --types {chosen}"
    return Recommendation(
        True,
        f"Put LoRA on {listed(placement.types)}: {chosen} of {len(scores.types)} module types, "
        f"{len(placement.modules):,} modules.",
        tuple(lines),
        (
            place,
            f"plop finetune {_model(scores)} {_data(scores)} --placement placement.json -o adapter",
            f"plop run {_model(scores)} {_data(scores)} -o run",
        ),
    )


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence, the first few of many."""
    if len(names) > _LISTED:
        return f"{', '.join(names[:_LISTED])} and {len(names) - _LISTED} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _cost_sentence(placement: Placement, cost: Cost | None, last: tuple[Placement, Cost | None]) -> str:
    rank = "ranks of its own" if placement.ranks else f"rank {placement.r}"
    sentence = f"It has {placement.num_parameters():,} trainable parameters at {rank}"
    if cost is not None:
        sentence += f", and training adds {_mib(cost)} to the memory of the model"
    every, its_cost = last
    if every.modules == placement.modules:
        return f"{sentence}; these are all linear layers."
    sentence += f"; all linear layers would have {every.num_parameters():,}"
    return f"{sentence} and add {_mib(its_cost)}." if its_cost is not None else f"{sentence}."


def _certainty_sentence(statistics: Statistics) -> str:
    types = "type comes" if statistics.k == 1 else f"{statistics.k} types come"
    layers = f"{_percent(statistics.set_over_layers)} of the resamples of the layers"
    if statistics.samples == 1:
        return f"The same {types} out in {layers}; one sample says nothing of other data, so score more."
    samples = f"{_percent(statistics.set_over_samples)} of the resamples of the samples"
    sentence = f"The same {types} out in {samples} and in {layers}"
    ties = [f"{tie.lower} and {tie.upper}" for tie in statistics.ties if tie.crosses_cut]
    return f"{sentence}; {ties[0]}, on the two sides of the cut, are tied." if ties else f"{sentence}."


def _number_sentence(statistics: Statistics, chosen: int) -> str:
    """Reconcile the number of types chosen with automatic k."""
    auto = statistics.auto
    stable = [boundary.k for boundary in auto.boundaries if boundary.survives]
    cut = f"the cut of the ranking after {chosen} {'type' if chosen == 1 else 'types'}"
    if chosen in stable:
        same = ", so --types auto chooses the same" if auto.k == chosen else ""
        other = "" if same else f"; --types auto chooses {auto.k}, the stable cut nearest to the paper's 3"
        return f"T{cut[1:]} is stable{same}{other}."
    if not stable:
        return (
            f"No cut of the ranking is stable, so the number of types is a convention: automatic k is {auto.reason}."
        )
    labels = [item.type for item in statistics.types]
    if auto.k > chosen:
        change = f"also take {listed(labels[chosen : auto.k])}"
    else:
        change = f"leave out {listed(labels[auto.k : chosen])}"
    paper = ", the number of the paper," if chosen == DEFAULT_TYPES else ""
    return (
        f"T{cut[1:]}{paper} is not stable, and that after {auto.k} is: for a choice that other samples and layers "
        f"confirm, {change} (--types {auto.k})."
    )


def _percent(share: float) -> str:
    # Truncated: 99.97 % is not every resample.
    return f"{int(1000 * share) / 10:g} %"


def _mib(cost: Cost) -> str:
    return f"{cost.total_bytes / 2**20:,.1f} MiB"


def _model(scores: Scores) -> str:
    return shlex.quote(str(scores.provenance["model"].get("name") or "MODEL"))


def _data(scores: Scores) -> str:
    return shlex.quote(str(scores.provenance["data"].get("name") or "DATA"))
