"""Fingerprints of scored weights, their norms, by which two checkpoints of one shape are distinguished."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plop_ext.lora_target import LoraTarget
from plop_ext.score_data import ScoredModule


@dataclass(frozen=True)
class Fingerprint:
    """The weight of a target when it was scored.

    Attributes:
        kind: `ScoredModule.kind` of the module.
        norm: ||W||_F of the whole module.
    """

    kind: str
    norm: float


def fingerprints_of(targets: Iterable[LoraTarget], everything: Iterable[ScoredModule]) -> dict[str, Fingerprint]:
    """Map each target that is a module of known weight to its fingerprint.

    Args:
        targets: What is adapted.
        everything: All scored modules.
    """
    held: dict[str, list[ScoredModule]] = {}
    for module in everything:
        held.setdefault(module.target.name, []).append(module)
    found = {}
    for target in targets:
        parts = held[target.name]
        norm = _norm(target, parts)
        if norm is not None:
            found[target.name] = Fingerprint(parts[-1].kind, norm)
    return found


def _norm(target: LoraTarget, parts: Sequence[ScoredModule]) -> float | None:
    """Return ||W||_F of a target that holds these scored modules; None if it is unknown or they are not all of it."""
    norms = [part.weight_norm for part in parts if part.weight_norm is not None]
    whole = sum(part.out_features for part in parts) == target.shape[-1]
    return math.hypot(*norms) if whole and len(norms) == len(parts) and not target.parameter else None
