"""What has no score, and why."""

from __future__ import annotations

from dataclasses import dataclass

# An expert that saw fewer is left out: its mean would be mostly noise.
MIN_EXPERT_TOKENS = 16
FEW_ROUTED = "too few tokens were routed to it"


def few_routed_detail(tokens: float) -> str:
    """How many tokens an expert saw that has no score for it."""
    return f"{tokens:.0f} of at least {MIN_EXPERT_TOKENS}"


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
