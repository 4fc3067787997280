"""What has a weight and no score."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UnscoredModule:
    """A module with a weight that is not scored.

    Attributes:
        name: Full module name.
        layer_class: Class of the module.
        reason: One phrase, the same for all modules it holds for.
        detail: What the reason leaves out, such as how many tokens an expert saw.
        wanted: Whether someone might miss it: False for what is left out by default or by the user.
    """

    name: str
    layer_class: str
    reason: str
    detail: str = ""
    wanted: bool = True
