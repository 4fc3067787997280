"""Blocks of an encoder whose output the model does not read, because it takes the features of an earlier block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from plop_ext.layers.attributes import attribute

UNREAD = "the model reads the features of an earlier block, so no gradient reaches it"

# Fields of a configuration that name the hidden states to read: of the encoder inside, or of its own.
_OF_VISION = ("vision_feature_layer", "vision_feature_layers")
_OWN = "feature_layer"


def unread_blocks(modules: Sequence[tuple[str, nn.Module]]) -> tuple[str, ...]:
    """Return the beginnings, up to a dot, of the names within blocks that are not read.

    Hidden state 0 is the input of the first block, and hidden state i the output of block i - 1.

    Args:
        modules: All modules of the model, by name.
    """
    read: dict[int, tuple[int, ...]] = {}
    for _, module in modules:
        config: Any = attribute(module, "config")
        encoder = getattr(config, "vision_config", None)
        for field in _OF_VISION:
            states = _states(getattr(config, field, None))
            if states and encoder is not None:
                read[id(encoder)] = states
    found: list[str] = []
    lists = [(name, module) for name, module in modules if isinstance(module, nn.ModuleList)]
    for name, module in modules:
        config = attribute(module, "config")
        states = read.get(id(config)) or _states(getattr(config, _OWN, None))
        count = getattr(config, "num_hidden_layers", None)
        if not states or type(count) is not int:
            continue
        last = max(state if state >= 0 else count + 1 + state for state in states)
        for blocks, members in lists:
            if blocks.startswith(f"{name}.") and len(members) == count:
                found += [f"{blocks}.{index}." for index in range(last, count)]
    return tuple(dict.fromkeys(found))


def _states(value: Any) -> tuple[int, ...]:
    """Return the indices of hidden states that a field names, one or several; none if it names no states."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(values) if all(type(item) is int for item in values) else ()
