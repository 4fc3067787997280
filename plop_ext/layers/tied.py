"""Weights that share memory, such as an output head tied to the embedding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from plop_ext.layers.sharded import shard_of


def tied_weights(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """Return the name of each matrix that shares memory, with the name of one with which it does.

    A module that two modules hold counts as two, because an adapter replaces it in one of them.

    Args:
        model: The model without adapters.
        modules: Its modules, by full name; a module with several names once per name.
    """
    by_name = dict(modules)
    spans = []
    offloaded = set()
    places = set()
    for module_name, module in by_name.items():
        parent, _, child = module_name.rpartition(".")
        place = (id(by_name.get(parent)), child)
        if place in places:  # another name of the same place
            continue
        places.add(place)
        for leaf, weight in module._parameters.items():
            if weight is None or is_lazy(weight) or weight.dim() < 2 or weight.numel() == 0:
                continue
            name = f"{module_name}.{leaf}" if module_name else leaf
            spans.append((*_span(weight), name))
            if weight.device.type == "meta":
                offloaded.add(name)
    spans.sort()
    tied: dict[str, str] = {}
    end, owner = -math.inf, ""
    for start, stop, name in spans:
        if start < end:
            tied[name] = owner
            tied.setdefault(owner, name)
        if stop > end:
            end, owner = stop, name
    return _declared(model, offloaded) | tied


def _span(weight: Tensor) -> tuple[int, int]:
    """Return the range of memory of a weight; one that has no address of its own is known by its object."""
    shard = shard_of(weight)
    weight = weight if shard is None else shard
    try:
        start = weight.data_ptr() if weight.device.type != "meta" else 0
    except (RuntimeError, NotImplementedError):  # tensor subclasses that hold their values in other tensors
        start = 0
    if start == 0:
        return -id(weight), 1 - id(weight)
    steps = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return start, start + (steps + 1) * weight.element_size()


def _declared(model: Any, offloaded: set[str]) -> dict[str, str]:
    """Return the ties that a model of transformers declares between offloaded weights, whose memory is elsewhere."""
    keys = getattr(model, "all_tied_weights_keys", None)
    pairs = keys.items() if isinstance(keys, Mapping) else ()
    return {
        name: other
        for target, source in pairs
        for name, other in ((target, source), (source, target))
        if name in offloaded
    }
