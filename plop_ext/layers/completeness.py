"""The repeated blocks that a model lacks: a pipeline stage holds some of them, and its scores are of this part."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from plop_ext.layers.attributes import attribute
from plop_ext.layers.walk import base_modules


def part_of_model(model: nn.Module) -> str:
    """Return which blocks of its configuration the model holds, as `blocks 0 to 3 of 8`; empty if it holds all.

    The blocks are the children of the list beside which `num_hidden_layers` is configured. A block that is elsewhere
    is missing from the list, or stands in it as a module without weights.
    """
    for name, module in base_modules(model):
        number = attribute(attribute(module, "config"), "num_hidden_layers")
        if not isinstance(number, int):
            continue
        for child_name, child in module._modules.items():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                held = _held(child)
                if held and _is_cut(child, held, number):
                    where = f"{name}.{child_name}" if name else child_name
                    return f"blocks {_ranges(held)} of {number} in `{where}`"
    return ""


def _held(blocks: nn.ModuleList | nn.ModuleDict) -> list[int]:
    """Return the numbers of the blocks with weights."""
    return [
        int(name)
        for name, block in blocks._modules.items()
        if name.isdigit() and block is not None and next(block.parameters(), None) is not None
    ]


def _is_cut(blocks: nn.Module, held: Collection[int], number: int) -> bool:
    """Return whether a list has the configured number of places, or had, and some of its blocks are elsewhere."""
    names = [int(name) for name in blocks._modules if name.isdigit()]
    gaps = names != list(range(len(names)))
    return len(held) < number and (gaps or len(names) == number)


def _ranges(numbers: Collection[int]) -> str:
    """Return sorted numbers as `0 to 3, 6`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
