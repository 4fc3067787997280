"""NFN of module types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from plop_ext.errors import InputError
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
        no_place: Why the type is no place for LoRA; empty if it is a candidate.
    """

    type: str
    nfn: float
    modules: int
    lowest: float
    highest: float
    family: str
    no_place: str = ""


def members_by_type(modules: Sequence[ScoredModule], positions: Iterable[int]) -> dict[str, list[int]]:
    """Map each type's label to its positions among `positions`."""
    members: dict[str, list[int]] = {}
    for position in positions:
        members.setdefault(modules[position].type, []).append(position)
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
        first = modules[positions[0]]
        found.append(
            TypeScore(
                label,
                values[label],
                len(positions),
                float(of_type.min()),
                float(of_type.max()),
                family(label, first.name),
                first.no_place,
            )
        )
    return tuple(sorted(found, key=lambda score: (score.nfn, score.type)))


def metric_names(values: Mapping[str, float]) -> dict[str, float]:
    """Return values by type under names that every tracker takes: a role follows a dot instead of an `@`."""
    return {label.replace("@", "."): value for label, value in values.items()}


def check_number_of_types(types: object, available: int) -> None:
    """Check that `types` is a number of the `available` types.

    Raises:
        InputError: If it is none.
    """
    if isinstance(types, bool) or not isinstance(types, Integral) or not 1 <= int(types) <= available:
        raise InputError(f"`types` must be between 1 and {available}, the number of module types, got {types}")


def no_place_lines(scores: Iterable[TypeScore]) -> list[str]:
    """Return one line per reason why types are no place for LoRA.

    With the number of modules, because others of the type may compete: those of the blocks that a model reads.
    """
    reasons: dict[str, list[str]] = {}
    for score in scores:
        count = f"{score.modules:,} module{'s' if score.modules > 1 else ''}"
        reasons.setdefault(score.no_place, []).append(f"{score.type} ({count})")
    return [f"scored, no place for LoRA: {', '.join(labels)}: {reason}" for reason, labels in reasons.items()]
