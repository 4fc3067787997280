"""Scores and placements as commands print them with --json."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plop_ext.placement import Placement
    from plop_ext.placement.cost import Cost
    from plop_ext.scores import Scores


def of_scores(scores: Scores, path: str | None) -> dict[str, Any]:
    """Return what a table of scores shows; the file has the totals of every module.

    Args:
        scores: The scores.
        path: Their file, if there is one.
    """
    return {
        "scores": path,
        "types": [dataclasses.asdict(item) for item in scores.by_type()],
        "statistics": None if scores.paper_script else scores.statistics().to_dict(),
        "unscored": [dataclasses.asdict(item) for item in scores.unscored],
        "tokens": scores.tokens,
        "provenance": dict(scores.provenance),
    }


def of_placement(placement: Placement, cost: Cost | None, path: str | None) -> dict[str, Any]:
    """Return a placement with its targets and its cost.

    Args:
        placement: The placement.
        cost: The memory that training it adds, or None if it is unknown.
        path: Its file, if there is one.
    """
    return {
        "placement": path,
        "label": placement.label,
        "types": placement.types,
        "modules": placement.modules,
        "r": placement.r,
        "ranks": placement.ranks,
        "parameters": placement.num_parameters(),
        "cost": None if cost is None else dataclasses.asdict(cost) | {"total_bytes": cost.total_bytes},
        "reason": placement.reason,
        "notes": placement.notes,
        "evidence": None if placement.evidence is None else dataclasses.asdict(placement.evidence),
        "targets": placement.targets(),
    }
