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
    _check_names(kwargs)
    selected = names(placement)
    r, alpha = rank_and_alpha(placement, r, lora_alpha)
    for name in ("lora_dropout", "use_dora", "lora_bias"):
        if selected["target_parameters"] and kwargs.get(name):
            raise InputError(
                f"`{name}`={kwargs[name]!r}: PEFT cannot do that on parameters, which this placement has "
                f"(`{selected['target_parameters'][0]}`); leave it out"
            )
    for note in placement.notes:
        warn(note)
    if placement.ranks:
        pattern = rank_pattern(placement.ranks, r)
        kwargs.setdefault("rank_pattern", pattern)
        kwargs.setdefault("alpha_pattern", alpha_pattern(pattern, alpha / r))
    return _config(r=r, lora_alpha=alpha, **selected, **kwargs)


def check_fields(kwargs: Mapping[str, Any]) -> None:
    """Check further fields of `LoraConfig` before there is a placement.

    Raises:
        InputError: If PEFT does not know a field, or refuses its value.
        SetupError: If PEFT is not installed.
    """
    _check_names(kwargs)
    _config(**kwargs)


def _check_names(kwargs: Mapping[str, Any]) -> None:
    for name in ("target_modules", "target_parameters"):
        if name in kwargs:
            raise InputError(f"`{name}` comes from the placement; leave it out")


def _config(**fields: Any) -> LoraConfig:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise SetupError("`lora_config` needs PEFT: pip install peft") from error
    try:
        return LoraConfig(**fields)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"PEFT refuses this configuration: {first_line(error)}; change or leave out the field"
        ) from error


def targets(placement: PlacementData) -> dict[str, Any]:
    """Return the keyword arguments for `LoraConfig`; see `Placement.targets`."""
    selected = names(placement)
    if not placement.ranks:
        return selected
    # Of every target, because the caller decides on the common rank.
    ranks = rank_pattern(placement.ranks, 0)
    return selected | {"rank_pattern": ranks, "alpha_pattern": alpha_pattern(ranks, 2)}


def names(placement: PlacementData) -> dict[str, list[str] | None]:
    """Return `target_modules` and `target_parameters` of a placement; None for no parameters.

    Raises:
        InputError: If PEFT can adapt none of the chosen modules.
    """
    placement.check_not_empty()
    parameters = [target.name for target in placement.lora_targets if target.parameter]
    modules = [target.name for target in placement.lora_targets if not target.parameter]
    return {"target_modules": modules, "target_parameters": parameters or None}


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


def verify(placement: PlacementData, peft_model: nn.Module, adapter_name: str | None = None) -> None:
    """Check that exactly the placement carries LoRA; see `Placement.verify`."""
    from torch import nn

    from plop_ext.placement.round_trip import check_round_trip  # needs torch, and placing does not

    check_type(nn.Module, "a model with adapters", peft_model=peft_model)
    check_type((str, type(None)), "the name of an adapter, or None", adapter_name=adapter_name)
    found = adapters(peft_model)
    if adapter_name is not None and adapter_name not in found:
        known = ", ".join(f"`{name}`" for name in sorted(found)) or "there are none"
        raise InputError(f"`adapter_name`: the model has no adapter `{adapter_name}`; its adapters: {known}")
    adapted = set[str]().union(*found.values()) if adapter_name is None else found[adapter_name]
    wanted = {target.name for target in placement.lora_targets}
    missing, extra = wanted - adapted, adapted - wanted
    if missing or extra:
        example = sorted(missing or extra)[0]
        raise InputError(
            f"`peft_model` does not match the placement: {len(missing)} chosen modules without LoRA and "
            f"{len(extra)} others with it (`{example}`); wrap the model that was scored with `lora_config()`"
        )
    check_round_trip(peft_model, adapter_name)


def adapters(peft_model: nn.Module) -> dict[str, set[str]]:
    """Return the modules and parameters that each adapter adapts, under their names in the model without adapters.

    A layer that PEFT leaves wrapped after its adapter was deleted has none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from plop_ext.layers import wrapped_modules  # loads the kernels, which the other functions do not need

    found: dict[str, set[str]] = {}
    for name, chain in wrapped_modules(peft_model):
        for layer in chain:  # parameters of one module nest
            if isinstance(layer, BaseTunerLayer):
                parameter = getattr(layer, "parameter_name", None)
                whole = name if parameter is None else f"{name}.{parameter}"
                for adapter in {key for kind in layer.adapter_layer_names for key in getattr(layer, kind, ())}:
                    found.setdefault(adapter, set()).add(whole)
    return found


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
