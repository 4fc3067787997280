"""Placements by name, and the rank of each module under the two protocols."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from benchmarks.placement.models import ATTENTION, MLP, TYPES, linear_modules, type_of

PROTOCOLS = ("one-rank", "matched")
TRIPLES = tuple(itertools.combinations(TYPES, 3))
EIGHT_SEED = 0  # of the eight triples drawn for the larger models


@dataclass(frozen=True)
class Placement:
    """Where adapters go.

    Attributes:
        key: What it is: types joined by `+`, or the name of a choice of single modules.
        modules: Full names, in the model's order.
        ranks: Ranks that come with the choice (EVA's) at the budget of all-linear; empty: the protocol's.
    """

    key: str
    modules: tuple[str, ...]
    ranks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranked:
    """A placement under a protocol.

    Attributes:
        ranks: Module -> rank.
        parameters: Trainable parameters.
        capped: Whether a rank would have exceeded the width of its module.
    """

    ranks: dict[str, int]
    parameters: int
    capped: bool


def of_types(model: nn.Module, types: Sequence[str]) -> Placement:
    """All modules of `types`."""
    chosen = [name for name in TYPES if name in types]
    modules = tuple(name for name in linear_modules(model) if type_of(name) in chosen)
    return Placement("+".join(chosen), modules)


def of_modules(model: nn.Module, name: str, modules: Sequence[str]) -> Placement:
    """Single modules; under the key of their types if they are all there is of them."""
    chosen = set(modules)
    whole = of_types(model, sorted({type_of(module) for module in chosen}))
    if set(whole.modules) == chosen:
        return whole
    return Placement(name, tuple(module for module in linear_modules(model) if module in chosen))


def fixed(model: nn.Module) -> dict[str, Placement]:
    """The placements that need no score, by key: triples, singles, all, all minus each, attention, random modules."""
    sets = [*TRIPLES, *((each,) for each in TYPES), TYPES, ATTENTION, MLP]
    sets += [tuple(other for other in TYPES if other != each) for each in TYPES]
    found = [of_types(model, types) for types in sets]
    names = list(linear_modules(model))
    found.append(of_modules(model, "modules:random", random.Random(0).sample(names, third(names))))
    return {placement.key: placement for placement in found}


def of_scores(model: nn.Module, nfn: Mapping[str, float], type_nfn: Mapping[str, float]) -> dict[str, Placement]:
    """PLoP with k = 1 ... 6 types, its inverse, and its lowest modules, by name.

    Args:
        model: The base.
        nfn: Of each module.
        type_nfn: Of each type.
    """
    order = sorted(type_nfn, key=lambda name: type_nfn[name])
    found = {f"plop-{k}": of_types(model, order[:k]) for k in range(1, len(TYPES))}
    found["inverse-3"] = of_types(model, order[-3:])
    names = list(linear_modules(model))
    lowest = sorted(names, key=lambda name: nfn[name])[: third(names)]
    found["modules:plop"] = of_modules(model, "modules:plop", lowest)
    return found


def third(names: Sequence[str]) -> int:
    """How many single modules make as many as three types: three sevenths."""
    return len(names) * 3 // len(TYPES)


def larger_subset(model: nn.Module) -> list[str]:
    """The triples tried on the larger models: the top and bottom three by size, and eight drawn from the rest."""
    order = sorted(TRIPLES, key=lambda types: -sum(_size(model, of_types(model, types).modules, _weights)))
    ends = [*order[:3], *order[-3:]]
    drawn = random.Random(EIGHT_SEED).sample([types for types in order if types not in ends], 8)
    return ["+".join(types) for types in (*ends, *drawn)]


def ranked(model: nn.Module, placement: Placement, protocol: str, rank: int) -> Ranked:
    """The ranks of `placement`.

    `"one-rank"`: `rank` everywhere. `"matched"`: the parameters that all-linear has at `rank`; the largest rank that
    fits everywhere, and one more in as many modules, spread over the model, as come nearest.
    """
    linears = linear_modules(model)
    sizes = {name: _adapter(linears[name]) for name in placement.modules}
    if placement.ranks:
        ranks = dict(placement.ranks)
    elif protocol == "one-rank":
        ranks = dict.fromkeys(placement.modules, rank)
    else:
        budget = rank * sum(_adapter(linear) for linear in linears.values())
        common = max(1, budget // sum(sizes.values()))
        ranks = dict.fromkeys(placement.modules, common)
        left = budget - common * sum(sizes.values())
        for name in _spread(placement.modules):
            if abs(left - sizes[name]) < abs(left):
                ranks[name] += 1
                left -= sizes[name]
    caps = {name: min(linears[name].in_features, linears[name].out_features) for name in ranks}
    capped = any(rank > caps[name] for name, rank in ranks.items())
    ranks = {name: min(rank, caps[name]) for name, rank in ranks.items() if rank}
    return Ranked(ranks, sum(rank * _adapter(linears[name]) for name, rank in ranks.items()), capped)


def _spread(names: Sequence[str]) -> list[str]:
    """`names` in an order whose every beginning is spread over the whole."""
    golden = (math.sqrt(5) - 1) / 2
    return [name for _, name in sorted((index * golden % 1, name) for index, name in enumerate(names))]


def _adapter(linear: nn.Linear) -> int:
    return linear.in_features + linear.out_features


def _weights(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features


def _size(model: nn.Module, names: Sequence[str], measure: Callable[[nn.Linear], int]) -> list[int]:
    linears = linear_modules(model)
    return [measure(linears[name]) for name in names]
