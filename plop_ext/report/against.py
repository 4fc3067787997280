"""Two score files side by side: two tasks on one model, or a base and an instruct model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from plop_ext.errors import InputError
from plop_ext.statistics.stability import tau_between

if TYPE_CHECKING:
    from plop_ext.scores import Scores

Range = tuple[float, float]


@dataclass(frozen=True)
class AgainstRow:
    """NFN of one type in both score files, with the intervals over samples."""

    type: str
    first: float
    second: float
    first_interval: Range | None
    second_interval: Range | None

    @property
    def ratio(self) -> float:
        """Second over first."""
        return self.second / self.first

    @property
    def differs(self) -> bool:
        """Whether the intervals over samples are disjoint."""
        a, b = self.first_interval, self.second_interval
        return a is not None and b is not None and (a[1] < b[0] or b[1] < a[0])


@dataclass(frozen=True)
class Against:
    """A comparison of two scores.

    Attributes:
        first_name: Name of the data of the first scores.
        second_name: Name of the data of the second scores.
        rows: The common types, in the order of the first scores.
        only_first: Types that only the first scores have.
        only_second: Types that only the second scores have.
        tau: Kendall's tau between the two orders of the common types.
        k: Number of types chosen from each.
        shared: The types among the k lowest of both.
        swapped: The types among the k lowest of one only.
    """

    first_name: str
    second_name: str
    rows: tuple[AgainstRow, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    tau: float
    k: int
    shared: tuple[str, ...]
    swapped: tuple[str, ...]


def compare_scores(first: Scores, second: Scores, k: int = 3) -> Against:
    """Compare the types that two scores have in common.

    Raises:
        InputError: If they have none in common.
    """
    one = {item.type: item for item in first.statistics().types}
    two = {item.type: item for item in second.statistics().types}
    common = [label for label in one if label in two]
    if not common:
        raise InputError("the two score files have no module type in common; compare models of one architecture")
    rows = tuple(
        AgainstRow(label, one[label].nfn, two[label].nfn, one[label].over_samples, two[label].over_samples)
        for label in common
    )
    orders = [np.array([[getattr(row, side) for row in rows]]) for side in ("first", "second")]
    lowest = [list(found)[:k] for found in (one, two)]
    names = [_name(first, second), _name(second, first)]
    if names[0] == names[1]:
        names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    return Against(
        first_name=names[0],
        second_name=names[1],
        rows=rows,
        only_first=tuple(label for label in one if label not in two),
        only_second=tuple(label for label in two if label not in one),
        tau=float(tau_between(*orders)[0]) if len(rows) > 1 else 1.0,
        k=k,
        shared=tuple(label for label in lowest[0] if label in lowest[1]),
        swapped=tuple(sorted(set(lowest[0]) ^ set(lowest[1]))),
    )


def _name(scores: Scores, other: Scores) -> str:
    """Return the name of the data, with the model's name if the models differ."""
    model, data = scores.provenance["model"], scores.provenance["data"]["name"] or "unnamed data"
    theirs = other.provenance["model"]
    label = str(model.get("name") or model["class"])
    return data if label == str(theirs.get("name") or theirs["class"]) else f"{label} on {data}"
