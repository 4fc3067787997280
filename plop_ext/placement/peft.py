"""PEFT's side of a placement: a `LoraConfig` that adapts exactly the placement, and the check of a wrapped model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from plop_ext._warnings import warn
from plop_ext.arguments import check_number, check_type
from plop_ext.errors import InputError, SetupError, first_line
from plop_ext.placement.data import PlacementData
from plop_ext.placement.ranks import check_rank

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def lora_config(
    placement: PlacementData, r: int | None = None, lora_alpha: int | None = None, **kwargs: Any
) -> LoraConfig:
    """Make a `peft.LoraConfig`; see `Placement.lora_config`."""
    for name in ("target_modules", "target_parameters"):
        if name in kwargs:
            raise InputError(f"`{name}` comes from the placement; leave it out")
    selected = targets(placement)
    r, alpha = rank_and_alpha(placement, r, lora_alpha)
    for name in ("lora_dropout", "use_dora", "lora_bias"):
        if "target_parameters" in selected and kwargs.get(name):
            raise InputError(
                f"`{name}`={kwargs[name]!r}: PEFT cannot do that on parameters, which this placement has "
                f"(`{selected['target_parameters'][0]}`); leave it out"
            )
    for note in placement.notes:
        warn(note)
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise SetupError("`lora_config` needs PEFT: pip install peft") from error
    if placement.ranks:
        pattern = rank_pattern(placement.ranks, r)
        kwargs.setdefault("rank_pattern", pattern)
        kwargs.setdefault("alpha_pattern", alpha_pattern(pattern, alpha / r))
    try:
        return LoraConfig(r=r, lora_alpha=alpha, **selected, **kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"PEFT refuses this configuration: {first_line(error)}; change or leave out the field"
        ) from error


def targets(placement: PlacementData) -> dict[str, Any]:
    """Return the keyword arguments for `LoraConfig`; see `Placement.targets`."""
    placement.check_not_empty()
    parameters = [target.name for target in placement.lora_targets if target.parameter]
    modules = [target.name for target in placement.lora_targets if not target.parameter]
    return {"target_modules": modules, **({"target_parameters": parameters} if parameters else {})}


def rank_and_alpha(
    placement: PlacementData, r: int | None = None, lora_alpha: float | None = None
) -> tuple[int, float]:
    """Return the common rank and alpha of a configuration: by default the placement's rank, and twice the rank.

    Raises:
        InputError: If `r` is given although ranks differ, or a number is out of range.
    """
    if r is not None and placement.ranks:
        raise InputError("`r`: every module of this placement has its own rank; leave `r` out")
    check_rank(r, placement.lora_targets)
    check_number(above=0, lora_alpha=lora_alpha)
    r = placement.r if r is None else r
    return r, 2 * r if lora_alpha is None else lora_alpha


def verify(placement: PlacementData, peft_model: nn.Module) -> None:
    """Check that exactly the placement carries LoRA; see `Placement.verify`."""
    from torch import nn

    from plop_ext.placement.round_trip import check_round_trip  # needs torch, and placing does not

    check_type(nn.Module, "a model with adapters", peft_model=peft_model)
    adapted, wanted = adapted_names(peft_model), {target.name for target in placement.lora_targets}
    missing, extra = wanted - adapted, adapted - wanted
    if missing or extra:
        example = sorted(missing or extra)[0]
        raise InputError(
            f"`peft_model` does not match the placement: {len(missing)} chosen modules without LoRA and "
            f"{len(extra)} others with it (`{example}`); wrap the model that was scored with `lora_config()`"
        )
    check_round_trip(peft_model)


def adapted_names(peft_model: nn.Module) -> set[str]:
    """Return the names, as in the model without adapters, of the modules and parameters that carry LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from plop_ext.layers import wrapped_modules  # loads the kernels, which the other functions do not need

    names = set()
    for name, chain in wrapped_modules(peft_model):
        for layer in chain:  # parameters of one module nest
            if isinstance(layer, BaseTunerLayer):
                parameter = getattr(layer, "parameter_name", None)
                names.add(name if parameter is None else f"{name}.{parameter}")
    return names


def rank_pattern(ranks: Mapping[str, int], common: int) -> dict[str, int]:
    """Return PEFT's `rank_pattern`: one alternation of escaped full names per rank other than `common`.

    PEFT tries the keys of the pattern on every module; one key per module takes minutes on a large model.
    """
    names: dict[int, list[str]] = {}
    for name, rank in ranks.items():
        if rank != common:
            names.setdefault(rank, []).append(re.escape(name))
    return {"|".join(group): rank for rank, group in sorted(names.items())}


def alpha_pattern(ranks: Mapping[str, int], scale: float) -> dict[str, float]:
    """Return PEFT's `alpha_pattern` for a `rank_pattern`, with alpha / r = `scale` everywhere."""
    alphas = {key: rank * scale for key, rank in ranks.items()}
    return {key: int(alpha) if alpha == int(alpha) else alpha for key, alpha in alphas.items()}
