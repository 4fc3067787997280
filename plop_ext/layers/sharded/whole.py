"""Whole weights of a sharded module, gathered for as long as they are read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.layers.sharded.units import flat_weights, unit_of


def shard_of(weight: object) -> Tensor | None:
    """Return what this process holds of a weight that `fully_shard` or tensor parallelism shards; None for others."""
    distributed = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    if not isinstance(weight, distributed):
        return None
    with torch.no_grad():
        return weight.to_local()


def is_sharded(module: nn.Module) -> bool:
    """Return whether a library shards parameters of the module itself, at present or outside of its forward."""
    unit = unit_of(module)
    if unit is not None and unit.wrapper is not None:
        return True
    return any(_is_sharded(weight) for weight in _weights(module))


def why_not_readable(module: nn.Module) -> str:
    """Return why the values of a module's own weights can neither be read nor gathered; empty if they can."""
    for weight in (*module._parameters.values(), vars(module).get("weight")):
        if type(weight) not in (nn.Parameter, Tensor) or weight is None:
            continue
        if weight.numel() and not weight.untyped_storage().size() and not is_sharded(module):
            return "its weight is released outside of its forward, by FSDP; score the model before it is sharded"
    return ""


@contextmanager
def shapes_known(module: nn.Module) -> Iterator[None]:
    """Hold weights of their own shapes in the module within the block, gathered if their shards do not tell them."""
    unit = unit_of(module)
    flat = unit is not None and unit.wrapper is not None
    if flat or any(hasattr(weight, "ds_numel") for weight in _weights(module)):
        with gathered(module):
            yield
    else:
        yield


@contextmanager
def gathered(module: nn.Module, *names: str) -> Iterator[None]:
    """Hold plain whole weights, of the type of the forward, in a sharded module within the block.

    Args:
        module: The module.
        names: Its parameters to gather; none gathers all.
    """
    unit = unit_of(module)
    with ExitStack() as stack, torch.no_grad():
        if unit is not None and unit.wrapper is not None:
            stack.enter_context(flat_weights(unit.wrapper))
        partitioned = [weight for weight in _weights(module, *names) if _is_partitioned(weight)]
        if partitioned:
            zero = sys.modules["deepspeed.runtime.zero.partition_parameters"]
            stack.enter_context(zero.GatheredParameters(partitioned))
        dtype = None if unit is None else unit.dtype
        for owner in _owners(module):
            for name, weight in _own(owner):
                if names and name not in names:
                    continue
                whole = _whole(weight, dtype)
                if whole is not weight:
                    _replace(stack, owner, name, whole)
        yield


def _weights(module: nn.Module, *names: str) -> list[Any]:
    return [weight for owner in _owners(module) for name, weight in _own(owner) if not names or name in names]


def _owners(module: nn.Module) -> list[nn.Module]:
    """Return the modules that hold the module's own weights: parametrized ones are in modules inside it."""
    inner = module._modules.get("parametrizations")
    return [module] if inner is None else [module, *inner.modules()]


def _own(owner: nn.Module) -> list[tuple[str, Any]]:
    """Return the weights of a module itself; FSDP 1 holds them as plain attributes."""
    own = [(name, weight) for name, weight in owner._parameters.items() if weight is not None]
    return own + [(name, value) for name in ("weight", "bias") if isinstance(value := vars(owner).get(name), Tensor)]


def _is_sharded(weight: Any) -> bool:
    return shard_of(weight) is not None or hasattr(weight, "ds_numel")


def _is_partitioned(weight: Any) -> bool:
    """Return whether ZeRO-3 holds a weight as an empty parameter at present."""
    return hasattr(weight, "ds_numel") and weight.numel() != weight.ds_numel


def _whole(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a weight whole and of a type; the weight itself if it is both."""
    if shard_of(weight) is not None:
        whole = on_mesh(weight.detach()).full_tensor()
    elif dtype is None or weight.dtype == dtype:
        return weight
    else:
        whole = weight.detach()
    return whole if dtype is None else whole.to(dtype)


def on_mesh(weight: Any) -> Any:
    """Return a `DTensor` on the device of its mesh, for a collective: FSDP may keep shards in the host's memory."""
    local = shard_of(weight)
    assert local is not None
    if local.device.type == weight.device_mesh.device_type:
        return weight
    return type(weight).from_local(
        local.to(weight.device_mesh.device_type),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def _replace(stack: ExitStack, owner: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a weight until the stack closes."""
    places: dict[str, Any] = owner._parameters if name in owner._parameters else vars(owner)
    stack.callback(places.__setitem__, name, places[name])
    places[name] = nn.Parameter(value, requires_grad=False) if places is owner._parameters else value
