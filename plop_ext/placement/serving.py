"""What inference engines can serve, and the nearest placement to one that they cannot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from plop_ext.arguments import check_choice
from plop_ext.lora_target import LoraTarget
from plop_ext.placement.data import PlacementData
from plop_ext.placement.targets import some

# Modules at the ends of a model, which engines hold apart from its blocks.
HEADS = ("lm_head", "embed_tokens", "embed_out")

PlacementT = TypeVar("PlacementT", bound=PlacementData)


@dataclass(frozen=True)
class Engine:
    """What an inference engine makes of an adapter that PEFT saved.

    Attributes:
        title: Name of the engine.
        release: The release whose rules these are.
        ranks: Whether it applies the rank and the alpha of each module. An engine without reads one of them for all,
            and scales other modules wrongly or not at all.
        experts: Whether it loads adapters of stacked experts, if both halves of a layer's experts have one.
        max_rank: The largest rank, or None.
        allowed: The values of its option for the largest rank; empty if it has none.
    """

    title: str
    release: str
    ranks: bool = False
    experts: bool = False
    max_rank: int | None = None
    allowed: tuple[int, ...] = ()


ENGINES = {
    "vllm": Engine(
        "vLLM", "0.33.0", ranks=True, experts=True, max_rank=512, allowed=(1, 8, 16, 32, 64, 128, 256, 320, 512)
    ),
    "sglang": Engine("SGLang", "0.5.23"),
    "llama.cpp": Engine("llama.cpp", "of 2026-08"),
}


@dataclass(frozen=True)
class Servable(Generic[PlacementT]):
    """Whether an engine can serve adapters of a placement; true if it can.

    Attributes:
        engine: The engine, with its release.
        reasons: Why it cannot serve them, one line each; empty if it can.
        nearest: The nearest placement that it can serve: the placement itself if there are no reasons; None if nothing
            is left.
        options: What the engine has to be told, one line each.
    """

    engine: str
    reasons: tuple[str, ...]
    nearest: PlacementT | None
    options: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.reasons


def servable(placement: PlacementT, engine: str) -> Servable[PlacementT]:
    """Return whether an engine can serve adapters of a placement; see `Placement.servable`."""
    check_choice(tuple(ENGINES), engine=engine)
    rules = ENGINES[engine]
    reasons: list[str] = []
    targets = _without_heads(placement.lora_targets, rules, reasons)
    targets = _with_whole_experts(targets, placement.left_out, rules, reasons)
    names = {target.name for target in targets}
    everything = (*placement.lora_targets, *placement.left_out)
    changed = replace(
        placement,
        lora_targets=targets,
        left_out=tuple(target for target in everything if target.name not in names),
        ranks={name: rank for name, rank in placement.ranks.items() if name in names},
        fingerprints={name: item for name, item in placement.fingerprints.items() if name in names},
    )
    changed = _with_ranks(changed, placement.num_parameters(), rules, reasons)
    title = f"{rules.title} {rules.release}"
    if not targets:
        return Servable(title, tuple(reasons), None, ())
    if reasons:
        changed = replace(changed, notes=(*placement.notes, *(f"for {rules.title}: {line}" for line in reasons)))
    return Servable(title, tuple(reasons), changed if reasons else placement, _options(changed, rules))


def _without_heads(targets: tuple[LoraTarget, ...], rules: Engine, reasons: list[str]) -> tuple[LoraTarget, ...]:
    heads = [target for target in targets if target.name.rsplit(".", 1)[-1] in HEADS]
    if heads:
        reasons.append(f"it serves no LoRA on heads and embeddings: without {_names(heads)}")
    return tuple(target for target in targets if target not in heads)


def _with_whole_experts(
    targets: tuple[LoraTarget, ...], left_out: tuple[LoraTarget, ...], rules: Engine, reasons: list[str]
) -> tuple[LoraTarget, ...]:
    """Return the targets with both halves of the experts of each layer, or with none."""
    placed = [target for target in targets if _stacked(target)]
    if not placed:
        return targets
    if not rules.experts:
        reasons.append(f"it loads no LoRA of stacked experts: without {_names(placed)}")
        return tuple(target for target in targets if target not in placed)
    owners = {_owner(target) for target in placed}
    missing = [target for target in left_out if _stacked(target) and _owner(target) in owners]
    refused = {_owner(target) for target in missing if target.refused}
    alone = {owner for owner in owners if sum(_owner(target) == owner for target in (*placed, *missing)) < 2}
    unfit = [target for target in placed if _owner(target) in refused | alone]
    added = tuple(target for target in missing if _owner(target) not in refused)
    if unfit:
        reasons.append(f"it serves both halves of a layer's experts or none: without {_names(unfit)}")
    if added:
        reasons.append(f"it serves both halves of a layer's experts or none: with {_names(added)} too")
    return (*(target for target in targets if target not in unfit), *added)


def _with_ranks(placement: PlacementT, parameters: int, rules: Engine, reasons: list[str]) -> PlacementT:
    """Return the placement with ranks that the engine applies, and at most as many parameters if they become one."""
    ranks = {placement.ranks.get(target.name, placement.r) for target in placement.lora_targets}
    if not ranks:
        return placement
    if len(ranks) > 1 and not rules.ranks:
        rank = max(1, parameters // placement.num_parameters(1))
        reasons.append(f"it applies one rank and one alpha to all modules: rank {rank} for all instead of ranks")
        placement = replace(placement, r=rank, ranks={})
        ranks = {rank}
    most = rules.max_rank
    if most is not None and max(ranks) > most:
        reasons.append(f"its largest rank is {most}, not {max(ranks)}")
        capped = {name: min(rank, most) for name, rank in placement.ranks.items()}
        placement = replace(placement, r=min(placement.r, most), ranks=capped)
    return placement


def _options(placement: PlacementData, rules: Engine) -> tuple[str, ...]:
    """Return what the engine has to be told for a placement that it can serve."""
    lines = []
    if rules.allowed:
        highest = max(placement.ranks_at().values())
        lines.append(f"--enable-lora --max-lora-rank {next(rank for rank in rules.allowed if rank >= highest)}")
    if rules.experts and any(_stacked(target) for target in placement.lora_targets):
        lines.append("--enable-mixed-moe-lora-format, and is_3d_lora_weight=True in the request")
    if not rules.experts and all(target.parameter for target in placement.lora_targets):
        leaves = dict.fromkeys(
            target.name.removesuffix(".weight").rsplit(".", 1)[-1] for target in placement.lora_targets
        )
        lines.append(f"--lora-target-modules {' '.join(leaves)}")
    return tuple(lines)


def _stacked(target: LoraTarget) -> bool:
    return target.parameter and len(target.shape) == 3


def _owner(target: LoraTarget) -> str:
    return target.name.rpartition(".")[0]


def _names(targets: list[LoraTarget] | tuple[LoraTarget, ...]) -> str:
    return some([target.name for target in targets])
