"""Roles: modules under one path that are different kinds of layer, such as linear and full attention, in one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """What tells the roles of a path apart.

    Attributes:
        path: The type's path, without the indices of blocks.
        owners: Classes of the modules that hold the matrix, from within its block down.
        shape: (in_features, out_features).
        layer_kind: Entry of the configuration's `layer_types` for the block; empty if there is none.
    """

    path: str
    owners: tuple[str, ...]
    shape: tuple[int, int]
    layer_kind: str


def roles_of(traits: Sequence[Traits]) -> list[str]:
    """Return the role of each matrix; empty where all modules of its path have the same.

    The modules of a path have several roles if classes or shapes differ with the kind of layer that the configuration
    declares; the role is then named after this kind. Otherwise they have several if their classes differ, and the role
    is the class. Widths that differ for any other reason, as in a pyramid of stages, make no role.
    """
    members: dict[str, list[int]] = {}
    for index, item in enumerate(traits):
        members.setdefault(item.path, []).append(index)
    roles = [""] * len(traits)
    for indices in members.values():
        names = _names([traits[index] for index in indices])
        for index, name in zip(indices, names, strict=True):
            roles[index] = name
    return roles


def _names(modules: Sequence[Traits]) -> list[str]:
    """Return the role of each module of one path."""
    kinds: dict[str, set[tuple[tuple[str, ...], tuple[int, int]]]] = {}
    for item in modules:
        kinds.setdefault(item.layer_kind, set()).add((item.owners, item.shape))
    if "" not in kinds and all(len(variants) == 1 for variants in kinds.values()):
        sharing: dict[tuple[tuple[str, ...], tuple[int, int]], list[str]] = {}
        for kind, (variant,) in kinds.items():
            sharing.setdefault(variant, []).append(kind)
        if len(sharing) > 1:
            return ["+".join(sharing[item.owners, item.shape]) for item in modules]
    # The innermost class that differs.
    for classes in reversed(list(zip(*(item.owners for item in modules), strict=False))):
        if len(set(classes)) > 1:
            return list(classes)
    return [""] * len(modules)
