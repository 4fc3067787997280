"""Training stacks that apply an export with their own code, one file each.

Each file has `adapted(path)`: the modules that get LoRA, by the names that the placement has for them, with rank and
alpha. `run` calls it in a process of its own, because the stacks' dependencies exclude each other.
"""

from __future__ import annotations

from pathlib import Path

Adapted = dict[str, tuple[int, float]]

# Stacks whose adapted model trains for a step in that process.
TRAINED = frozenset(("axolotl", "llama-factory", "ms-swift", "nemo-automodel", "openrlhf", "peft", "trl", "verl"))


def own_code(stack: str) -> bool:
    """Whether a stack applies exports with its own code in `tests/stacks`."""
    return Path(__file__).with_name(f"{stack.replace('-', '_')}_stack.py").is_file()
