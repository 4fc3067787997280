"""Makes the `Plan` of an export, with what its stack cannot say of the placement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

from plop_ext.errors import InputError
from plop_ext.lora_target import LoraTarget
from plop_ext.placement.data import PlacementData
from plop_ext.placement.exports._stack import Plan, Stack, whole
from plop_ext.placement.peft import rank_and_alpha
from plop_ext.placement.ranks import most_common
from plop_ext.placement.serving import HEADS
from plop_ext.placement.targets import some


def make_plan(placement: PlacementData, stack: Stack, r: int | None, lora_alpha: float | None) -> Plan:
    """Return what an export to `stack` writes, with all that the stack cannot say among its losses.

    Args:
        placement: The placement.
        stack: The stack.
        r: Rank of all modules; default the ranks of the placement.
        lora_alpha: Alpha of modules with the common rank; default twice that rank.

    Raises:
        InputError: If a number is out of range, or nothing of the placement can be said.
    """
    placement.check_not_empty()
    rank, alpha = rank_and_alpha(placement, r, lora_alpha)
    losses: list[str] = []
    entries = {target: stack.entry(target) for target in placement.lora_targets}
    parameters = [target for target, entry in entries.items() if entry is None and target.parameter]
    unnamed = [target for target, entry in entries.items() if entry is None and not target.parameter]
    heads = [] if stack.heads else [target for target in entries if _is_head(target)]
    dropped = {*unnamed, *heads, *(() if stack.parameters else parameters)}
    if parameters and not stack.parameters:
        losses.append(f"it adapts no parameters of a module: {_names(parameters)} would get no LoRA")
    if unnamed:
        losses.append(f"it has no name for {_names(unnamed)}")
    if heads:
        losses.append(f"it trains {_names(heads)} in full instead of with LoRA")
    kept = {target: entry or target.name for target, entry in entries.items() if target not in dropped}
    if not kept:
        raise InputError(
            f"`{placement.label}` cannot be exported to {stack.title}: {'; '.join(losses)}; nothing else is placed"
        )
    named = {entry: target for target, entry in kept.items() if entries[target] is not None}
    others = _others(placement, dropped)
    caught = stack.catches(set(named), others)
    if caught:
        losses.append(f"it would also adapt {some(caught)}, which its rule for names ({stack.names}) selects too")
    own_ranks = {target.name: placement.ranks.get(target.name, rank) for target in kept}
    common = most_common(own_ranks)
    if common != rank:  # where targets were dropped
        rank, alpha = common, alpha / rank * common
    losses.extend(_lost_ranks(stack, set(own_ranks.values()), rank, alpha))
    ranks = {entry: own_ranks[target.name] for target, entry in kept.items() if own_ranks[target.name] != rank}
    return Plan(
        stack=stack,
        label=placement.label,
        model=placement.model,
        r=rank,
        alpha=whole(alpha) if stack.alphas.whole or alpha == int(alpha) else alpha,
        modules=tuple(named),
        parameters=tuple(target.name for target in parameters if target in kept),
        ranks=ranks if stack.ranks else {},
        left_out=others,
        losses=tuple(losses),
        remarks=placement.notes,
        placed=len(kept),
    )


def _lost_ranks(stack: Stack, ranks: Set[int], rank: int, alpha: float) -> Iterator[str]:
    """Give a line for each thing about ranks and alphas that a stack cannot say."""
    lowest, highest = min(ranks), max(ranks)
    if len(ranks) > 1 and not stack.ranks:
        yield f"it has one rank for all modules: {rank} instead of {lowest} to {highest}"
    elif len(ranks) > 1 and not stack.alphas.per_module:
        yield (
            f"it has one alpha for all modules: alpha / r would be {alpha / highest:.3g} to {alpha / lowest:.3g} "
            f"instead of {alpha / rank:.3g}"
        )
    written = ranks if stack.ranks and stack.alphas.per_module else {rank}
    odd = [own * alpha / rank for own in sorted(written) if own * alpha % rank]
    if stack.alphas.whole and odd:
        yield f"its alpha is a whole number: {odd[0]:g} would be rounded"


def _others(placement: PlacementData, dropped: Set[LoraTarget]) -> tuple[str, ...]:
    """Return the names of the modules that get no LoRA; dense parameters by the name of their module."""
    names = (target.name for target in (*placement.left_out, *dropped))
    return tuple(dict.fromkeys(name.removesuffix(".weight") for name in (*names, *placement.unscored)))


def _is_head(target: LoraTarget) -> bool:
    return target.name.rsplit(".", 1)[-1] in HEADS


def _names(targets: Iterable[LoraTarget]) -> str:
    return some([target.name for target in targets])
