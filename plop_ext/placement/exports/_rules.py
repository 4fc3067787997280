"""Rules by which training stacks read names, and the names by which they know a target."""

from __future__ import annotations

from collections.abc import Iterable, Set

from plop_ext.lora_target import LoraTarget
from plop_ext.module_types import suffixes


def by_suffix(entries: Set[str], names: Iterable[str]) -> list[str]:
    """Return the names that PEFT adapts for a list of targets: an entry is the name, or ends it at a dot."""
    return [name for name in names if any(suffix in entries for suffix in suffixes(name))]


def by_name(entries: Set[str], names: Iterable[str]) -> list[str]:
    """Return the names that a stack adapts if it compares whole names."""
    return [name for name in names if name in entries]


def by_substring(entries: Set[str], names: Iterable[str]) -> list[str]:
    """Return the names that a stack adapts if it looks for an entry anywhere in a name."""
    lengths = {len(entry) for entry in entries}
    return [
        name
        for name in names
        if any(name[start : start + length] in entries for start in range(len(name)) for length in lengths)
    ]


def same_name(target: LoraTarget) -> str | None:
    """Return a module's name in the model; None for a parameter."""
    return None if target.parameter else target.name


def module_name(target: LoraTarget) -> str | None:
    """Return the name of the module that holds a matrix; None for stacked experts.

    PEFT gets a dense matrix of a mixture of experts as the parameter `NAME.weight`. A stack that does without PEFT
    adapts the module.
    """
    if not target.parameter:
        return target.name
    return target.name.removesuffix(".weight") if len(target.shape) == 2 and target.name.endswith(".weight") else None
