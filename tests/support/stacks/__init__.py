"""Training stacks that apply an export with their own code, one file each.

Each file has `adapted(path)`: the modules that get LoRA, by the names that the placement has for them, with rank and
alpha. `run` calls it in a process of its own, because the stacks' dependencies exclude each other.
"""

from __future__ import annotations

Adapted = dict[str, tuple[int, float]]
