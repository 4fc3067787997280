"""The targets that PEFT adapts for a choice, and their differences from the choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from plop_ext.lora_target import LoraTarget
from plop_ext.score_data import ScoreData, ScoredModule
from plop_ext.score_data.modules import FEW_ROUTED


def targets_of(chosen: Iterable[ScoredModule]) -> tuple[LoraTarget, ...]:
    """Return the targets that hold the chosen modules, each once, without those that PEFT refuses."""
    return tuple({module.target.name: module.target for module in chosen if not module.target.refused}.values())


def left_out(chosen: Iterable[LoraTarget], scores: ScoreData) -> tuple[LoraTarget, ...]:
    """Return the targets of the model that were not chosen, each once, also those that PEFT refuses."""
    few = scores.few_tokens.modules if scores.few_tokens is not None else ()
    rest = {module.target.name: module.target for module in (*scores.modules, *few)}
    for target in chosen:
        rest.pop(target.name, None)
    return tuple(rest.values())


def notes_of(chosen: Sequence[ScoredModule], everything: Iterable[ScoredModule]) -> tuple[str, ...]:
    """Return one line per difference between the choice and what PEFT can adapt.

    Args:
        chosen: The modules of the placement.
        everything: All scored modules.
    """
    notes = []
    refused: dict[str, list[str]] = {}
    for module in chosen:
        if module.target.refused:
            refused.setdefault(module.target.refused, []).append(module.name)
    for reason, names in refused.items():
        notes.append(f"without LoRA: {some(names)}: {reason}")
    parts = Counter(module.target.name for module in everything)
    more = parts - Counter(module.target.name for module in chosen)
    widened = [target.name for target in targets_of(chosen) if more[target.name]]
    if widened:
        count = sum(more[name] for name in widened)
        notes.append(
            f"PEFT adapts whole weights: {some(widened)} also hold "
            f"{count} scored part{'s' if count > 1 else ''} that {'were' if count > 1 else 'was'} not chosen"
        )
    return tuple(notes)


def lines_of_experts(scores: ScoreData, placed: Iterable[LoraTarget]) -> list[str]:
    """Return one line per reason for experts that get no LoRA, because they have no score.

    Args:
        scores: The scores.
        placed: The targets of the placement. An expert without a score is adapted with the others of its layer.
    """
    reasons: dict[str, list[str]] = {}
    known = {target.name for target in placed}
    for module in scores.few_tokens.modules if scores.few_tokens is not None else ():
        if module.target.name not in known:
            reasons.setdefault(FEW_ROUTED, []).append(module.name)
    for item in scores.unscored:
        if item.wanted and item.reason != FEW_ROUTED and "experts" in item.name.split("."):
            reasons.setdefault(item.reason, []).append(item.name)
    return [f"without LoRA: {some(names)}: {reason}" for reason, names in reasons.items()]


def some(names: Sequence[str]) -> str:
    """Return the first names of several, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
