"""Modules with a weight, but without a score."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UnscoredModule:
    """A module with a weight that is not scored.

    Attributes:
        name: Full module name.
        layer_class: Class of the module.
        reason: A phrase that is the same for all modules with this reason.
        detail: An addition to the reason for this module, such as the number of tokens that an expert saw.
        wanted: Whether the missing score may surprise you: False for modules excluded by default or by you.
    """

    name: str
    layer_class: str
    reason: str
    detail: str = ""
    wanted: bool = True
