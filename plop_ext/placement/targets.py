"""What PEFT is told, and what it then did: entries of a `LoraConfig`, and the names that carry LoRA afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plop_ext.errors import InputError
from plop_ext.placement.fingerprint import target_norm

if TYPE_CHECKING:
    from torch import nn

    from plop_ext.score_data import ScoredModule


@dataclass(frozen=True)
class Target:
    """One module or parameter that gets LoRA.

    Attributes:
        name: Full name of the module, or of the parameter.
        parameter: Whether it goes into `target_parameters`.
        size: Trainable parameters per unit of rank.
        shape: (in_features, out_features) of the module, or the shape of the parameter.
        chosen: How many of the placement's modules it holds.
        parts: How many scored modules it holds in all: more than `chosen` if PEFT cannot adapt only the chosen ones.
        kind: `ScoredModule.kind` of these.
        weight_norm: ||W||_F of the whole module when it was scored, or None where it is unknown.
    """

    name: str
    parameter: bool
    size: int
    shape: tuple[int, ...]
    chosen: int = 1
    parts: int = 1
    kind: str = ""
    weight_norm: float | None = None


def targets_of(chosen: Iterable[ScoredModule], everything: Iterable[ScoredModule]) -> tuple[Target, ...]:
    """The targets that hold the chosen modules, each once; what PEFT refuses is left out.

    Args:
        chosen: The modules of the placement.
        everything: All scored modules.
    """
    held: dict[str, list[ScoredModule]] = {}
    for module in everything:
        held.setdefault(module.target or module.name, []).append(module)
    targets: dict[str, Target] = {}
    counts: dict[str, int] = {}
    for module in chosen:
        if module.refused:
            continue
        name = module.target or module.name
        counts[name] = counts.get(name, 0) + 1
        features = (module.in_features, module.out_features)
        size = module.target_size or sum(features)
        shape = module.target_shape or features
        parts = held[name]
        norm = target_norm(parts, shape)
        targets[name] = Target(name, module.target_parameter, size, shape, counts[name], len(parts), module.kind, norm)
    return tuple(targets.values())


def notes_of(chosen: Iterable[ScoredModule], targets: Iterable[Target]) -> tuple[str, ...]:
    """One line for each thing that PEFT cannot do as chosen."""
    notes = []
    refused: dict[str, list[str]] = {}
    for module in chosen:
        if module.refused:
            refused.setdefault(module.refused, []).append(module.name)
    for reason, names in refused.items():
        notes.append(f"without LoRA: {_some(names)}: {reason}")
    widened = [target for target in targets if target.chosen < target.parts]
    if widened:
        more = sum(target.parts - target.chosen for target in widened)
        notes.append(
            f"PEFT adapts whole weights: {_some([target.name for target in widened])} also hold "
            f"{more} scored part{'s' if more > 1 else ''} that {'were' if more > 1 else 'was'} not chosen"
        )
    return tuple(notes)


def adapted_names(peft_model: nn.Module) -> set[str]:
    """Full names of the modules and parameters that carry LoRA, as the model without adapters names them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = set()
    for name, module in peft_model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        parts = name.removeprefix("base_model.model.").split(".")
        clean = ".".join(part for part in parts if part != "base_layer")  # parameters of one module nest
        parameter = getattr(module, "parameter_name", None)
        names.add(clean if parameter is None else f"{clean}.{parameter}")
    return names


def check_targets(model: nn.Module, targets: Iterable[Target]) -> None:
    """Check that `model` has every target, in the shape that was scored.

    Raises:
        InputError: If it lacks one or has another shape: the placement belongs to another model.
    """
    modules = dict(model.named_modules())
    for target in targets:
        found = _found_shape(modules, target)
        if found == target.shape:
            continue
        state = "has no such module" if found is None else f"has {_extents(found)} there"
        raise InputError(
            f"the placement was made for another model: it wants `{target.name}` ({_extents(target.shape)}), "
            f"but {type(model).__name__} {state}; score this model and place again"
        )


def _found_shape(modules: dict[str, nn.Module], target: Target) -> tuple[int, ...] | None:
    from plop_ext.layers import adapter_for

    if target.parameter:
        owner, _, leaf = target.name.rpartition(".")
        parameter: Any = getattr(modules.get(owner), leaf, None)
        return None if parameter is None else tuple(parameter.shape)
    module = modules.get(target.name)
    adapter = None if module is None else adapter_for(module)
    return None if module is None or adapter is None else adapter.features(module)


def _extents(shape: tuple[int, ...]) -> str:
    return " x ".join(str(extent) for extent in shape)


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
