"""Observations about the layers of a run in addition to their totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from plop_ext.layers import LinearLayer

# Layers of one module, each with its row in the totals.
IndexedLayers: TypeAlias = Sequence[tuple[int, LinearLayer]]


@dataclass(frozen=True)
class Notes:
    """Names of layers of which not every call counts.

    Attributes:
        unassigned: Layers with rows whose sample or padding cannot be told, with the reason.
    """

    unassigned: dict[str, str] = field(default_factory=dict)

    def leave_out(self, layers: IndexedLayers, reason: str) -> None:
        """Record why a module's calls cannot be counted."""
        self.unassigned.update((layer.name, reason) for _, layer in layers)
