"""The FSDP units of a model: which unit gathers the weights of a module, and what is gathered outside of forwards."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn


@dataclass(frozen=True)
class Unit:
    """How FSDP holds the weights of one module.

    Attributes:
        wrapper: The module of FSDP 1 that gathers them; None for `fully_shard`, whose weights gather themselves.
        dtype: Type to which a forward casts them; None keeps theirs.
        dimensions: Dimensions of the mesh over which FSDP shards and replicates them.
    """

    wrapper: nn.Module | None
    dtype: torch.dtype | None
    dimensions: int


# Filled by `at_rest`: a module does not know its unit.
_UNITS: weakref.WeakKeyDictionary[nn.Module, Unit] = weakref.WeakKeyDictionary()

# Units of FSDP 1 within `flat_weights`, which FSDP does not gather twice.
_GATHERED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def unit_of(module: nn.Module) -> Unit | None:
    """Return the unit of a module's own weights, within `at_rest`; None if FSDP does not hold them."""
    return _UNITS.get(module)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Know the FSDP units of `model` within the block, and release what its forwards gathered after the block.

    Weights that were gathered before the block, as after a forward without resharding, stay gathered.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        yield
        return
    modules = list(model.modules())
    flat = [module for module in modules if isinstance(module, fsdp.FullyShardedDataParallel)]
    sharding = [module for module in modules if isinstance(module, fsdp.FSDPModule)]
    units = _flat_units(flat) | _sharding_units(sharding)
    resting = [module for module in sharding if not any(group.is_unsharded for group in _groups(module))]
    if flat:
        # The first unit that FSDP 1 gathers counts as the outermost one from then on.
        with flat_weights(flat[0]):
            pass
    released = [module for module in flat if _is_released(module)]
    outer = {module: _UNITS[module] for module in units if module in _UNITS}
    _UNITS.update(units)
    try:
        yield
    finally:
        for module in units:
            _UNITS.pop(module, None)
        _UNITS.update(outer)
        for module in resting:
            module.reshard()
        for module in released:
            _release(module)


def whole_size(model: nn.Module) -> dict[str, int]:
    """Return `parameters` and `weight_bytes` if the shards of `model` do not tell them, within `at_rest`."""
    flat = [unit.wrapper for unit in map(_UNITS.get, model.modules()) if unit is not None and unit.wrapper is not None]
    weights: list[tuple[int, int]] = []
    for wrapper in dict.fromkeys(cast(list[Any], flat)):
        weight = wrapper._handle.flat_param
        weights += [(shape.numel(), weight.element_size()) for shape in weight._shapes]
    if not flat:
        partitioned = [weight for weight in model.parameters() if hasattr(weight, "ds_numel")]
        weights = [(weight.ds_numel, weight.element_size()) for weight in partitioned]
    if not weights:
        return {}
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return {
        "parameters": sum(numel for numel, _ in weights),
        "weight_bytes": sum(numel * size for numel, size in weights) + buffers,
    }


@contextmanager
def flat_weights(wrapper: Any) -> Iterator[None]:
    """Hold the whole weights of one unit of FSDP 1 within the block, and not of those inside."""
    if wrapper in _GATHERED:
        yield
        return
    with type(wrapper).summon_full_params(wrapper, recurse=False, writeback=False):
        _GATHERED.add(wrapper)
        try:
            yield
        finally:
            _GATHERED.discard(wrapper)


def _sharding_units(modules: list[Any]) -> dict[nn.Module, Unit]:
    """Return the units of `fully_shard`, by the module that holds the weights."""
    return {
        weight._module_info.module: Unit(None, group.mp_policy.param_dtype, weight.mesh_info.mesh.ndim)
        for module in modules
        for group in _groups(module)
        for weight in group.fsdp_params
    }


def _groups(module: Any) -> list[Any]:
    """Return the groups of weights that a module of `fully_shard` gathers; torch 2.12 allows several."""
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _flat_units(modules: list[Any]) -> dict[nn.Module, Unit]:
    """Return the units of FSDP 1, by the module that holds the weights."""
    return {
        info.module: Unit(module, module.mixed_precision.param_dtype, 1)
        for module in modules
        if module._handle is not None
        for info in (*module._handle.flat_param._param_infos, *module._handle.flat_param._shared_param_infos)
    }


def _is_released(module: Any) -> bool:
    """Return whether FSDP 1 has released the gathered weights of a unit."""
    handle = module._handle
    return handle is not None and handle.uses_sharded_strategy and handle.needs_unshard()


def _release(module: Any) -> None:
    """Release the gathered weights of a unit of FSDP 1, which keeps those of the outermost one after a forward."""
    if not _is_released(module):
        module._handle.reshard(True)
        module._handle.post_reshard()
