"""`Stack`: what the configuration of a training stack can express; `Plan`: what an export writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from plop_ext.lora_target import LoraTarget
from plop_ext.placement.exports._rules import by_suffix, same_name
from plop_ext.placement.peft import alpha_pattern, rank_pattern


class Alphas(Enum):
    """What a stack lets alpha be."""

    ONE = "one, any number"
    ONE_WHOLE = "one, a whole number"
    WHOLE = "per module, whole numbers"
    ANY = "per module, any number"

    @property
    def per_module(self) -> bool:
        """Whether modules can have alphas of their own."""
        return self in (Alphas.WHOLE, Alphas.ANY)

    @property
    def whole(self) -> bool:
        """Whether every alpha has to be a whole number."""
        return self in (Alphas.WHOLE, Alphas.ONE_WHOLE)


@dataclass(frozen=True)
class Stack:
    """What the configuration of a training stack can express, and how it is written.

    Attributes:
        title: Name of the stack.
        release: The release that this describes, or the date of its source.
        form: Form of the export, for tables.
        write: Makes the configuration from a `Plan`, without the comments at its head.
        peft: Whether the stack hands the configuration to PEFT.
        parameters: Whether it adapts parameters, such as stacked experts.
        ranks: Whether modules can have ranks of their own.
        alphas: What alpha can be.
        names: How entries are read, in words.
        entry: Gives the entry for a target; None if there is none.
        catches: Gives those of a model's modules, by name, that the stack adapts for a set of entries.
        heads: Whether output heads and embeddings get LoRA, and are not trained in full.
        use: How the export is used, for its head.
        caution: What the user has to see to, for its head.
    """

    title: str
    release: str
    form: str
    write: Callable[[Plan], str]
    peft: bool = True
    parameters: bool = False
    ranks: bool = False
    alphas: Alphas = Alphas.ONE_WHOLE
    names: str = "full names"
    entry: Callable[[LoraTarget], str | None] = same_name
    catches: Callable[[Set[str], Iterable[str]], list[str]] = by_suffix
    heads: bool = True
    use: str = ""
    caution: str = ""


@dataclass(frozen=True)
class Plan:
    """What an export writes.

    Attributes:
        stack: The stack.
        label: Label of the placement.
        model: Class of the model.
        r: The common rank.
        alpha: The common alpha.
        modules: Entries for the modules, each once, in the model's order.
        parameters: Full names of the parameters.
        ranks: The ranks that differ from `r`, by the entry of their module or parameter.
        left_out: Names of the model's other modules.
        losses: What the stack cannot say, one line each.
        remarks: What the placement itself notes.
        placed: How many modules and parameters of the placement get LoRA.
    """

    stack: Stack
    label: str
    model: str
    r: int
    alpha: int | float
    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    placed: int = 0

    @property
    def scale(self) -> float:
        """Alpha / r, the same for all modules."""
        return self.alpha / self.r

    def patterns(self) -> dict[str, dict[str, Any]]:
        """Return PEFT's `rank_pattern` and `alpha_pattern`; empty if all ranks are equal."""
        if not self.ranks:
            return {}
        ranks = rank_pattern(self.ranks, self.r)
        alphas = alpha_pattern(ranks, self.scale)
        if self.stack.alphas.whole:
            alphas = {key: whole(alpha) for key, alpha in alphas.items()}
        return {"rank_pattern": ranks, "alpha_pattern": alphas}

    def by_rank(self) -> dict[int, list[str]]:
        """Return the entries of the modules by rank."""
        groups: dict[int, list[str]] = {}
        for name in self.modules:
            groups.setdefault(self.ranks.get(name, self.r), []).append(name)
        return groups


def whole(alpha: float) -> int:
    """Return the nearest whole number that alpha can be."""
    return max(1, round(alpha))
