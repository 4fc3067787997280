"""NFN of module types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plop_ext.module_types import family
from plop_ext.score_data.modules import ScoredModule


@dataclass(frozen=True)
class TypeScore:
    """NFN of one module type.

    Attributes:
        type: Label.
        nfn: Mean over the modules of the type (ratio of sums with `compat="paper-script"`).
        modules: Number of modules.
        lowest: Lowest module NFN.
        highest: Highest module NFN.
        family: `"attention"`, `"mlp"` or `"other"`.
    """

    type: str
    nfn: float
    modules: int
    lowest: float
    highest: float
    family: str


def members_by_type(modules: Sequence[ScoredModule]) -> dict[str, list[int]]:
    """Map each type's label to the positions of its modules."""
    members: dict[str, list[int]] = {}
    for position, module in enumerate(modules):
        members.setdefault(module.type, []).append(position)
    return members


def score_types(
    modules: Sequence[ScoredModule],
    nfn: NDArray[np.float64],
    members: Mapping[str, Sequence[int]],
    values: Mapping[str, float],
) -> tuple[TypeScore, ...]:
    """Make one `TypeScore` per type, lowest NFN first; types of equal NFN follow their labels.

    Args:
        modules: The M scored modules.
        nfn: [M] their NFN.
        members: Each type's label to the positions of its modules.
        values: Each type's label to its NFN.
    """
    found = []
    for label, positions in members.items():
        of_type = nfn[list(positions)]
        kind = family(label, modules[positions[0]].name)
        found.append(TypeScore(label, values[label], len(positions), float(of_type.min()), float(of_type.max()), kind))
    return tuple(sorted(found, key=lambda score: (score.nfn, score.type)))
