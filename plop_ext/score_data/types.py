"""NFN of module types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from plop_ext.module_types import family
from plop_ext.score_data import paper_script

if TYPE_CHECKING:
    from plop_ext.scores.scores import Scores


@dataclass(frozen=True)
class TypeScore:
    """NFN of one module type.

    Attributes:
        type: Label.
        nfn: Mean over the modules of the type (ratio of sums with `compat="paper-script"`).
        modules: How many modules.
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


def by_type(scores: Scores) -> tuple[TypeScore, ...]:
    """One `TypeScore` per module type, lowest NFN first."""
    nfn = scores.nfn
    found = []
    for label, members in _groups(scores).items():
        value = paper_script.type_nfn(scores, members) if scores.paper_script else float(nfn[members].mean())
        lowest, highest = float(nfn[members].min()), float(nfn[members].max())
        kind = family(label, scores.modules[members[0]].name)
        found.append(TypeScore(label, value, len(members), lowest, highest, kind))
    return tuple(sorted(found, key=lambda score: (score.nfn, score.type)))


def _groups(scores: Scores) -> dict[str, list[int]]:
    if scores.paper_script:
        return paper_script.groups(scores.module_names)
    groups: dict[str, list[int]] = {}
    for index, module in enumerate(scores.modules):
        groups.setdefault(module.type, []).append(index)
    return groups
