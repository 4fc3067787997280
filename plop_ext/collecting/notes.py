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
    """Names of layers to which the mask does not apply.

    Attributes:
        unmasked: Layers whose rows are not the tokens of the mask, so that all rows count.
        unassigned: Layers whose rows belong to no sample, so that none counts, with the reason.
    """

    unmasked: set[str] = field(default_factory=set)
    unassigned: dict[str, str] = field(default_factory=dict)

    def count_all(self, layers: IndexedLayers) -> None:
        """Record that all rows of a module's calls count."""
        self.unmasked.update(layer.name for _, layer in layers)

    def leave_out(self, layers: IndexedLayers, reason: str) -> None:
        """Record why a module's calls cannot be counted."""
        self.unassigned.update((layer.name, reason) for _, layer in layers)
