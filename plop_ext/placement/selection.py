"""Choose modules from scores: a pure function, no model and no PEFT."""

from __future__ import annotations

import random
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np

from plop_ext.errors import InputError
from plop_ext.placement.placement import Placement
from plop_ext.placement.targets import notes_of, targets_of
from plop_ext.scores import Scores

STRATEGIES = ("lowest", "inverse", "attention", "mlp", "all", "random")
DEFAULT_TYPES = 3


def select(
    scores: Scores,
    *,
    types: int | Sequence[str] | None = None,
    modules: int | float | None = None,
    max_nfn: float | None = None,
    strategy: str = "lowest",
    seed: int = 0,
) -> Placement:
    """Choose modules from scores; see `Scores.place`."""
    if strategy not in STRATEGIES:
        raise InputError(f"`strategy` must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    given = [
        name for name, value in (("types", types), ("modules", modules), ("max_nfn", max_nfn)) if value is not None
    ]
    if len(given) > 1:
        raise InputError(f"`{given[0]}` and `{given[1]}` exclude each other; give one")
    if strategy in ("attention", "mlp", "all"):
        if given:
            raise InputError(f'`{given[0]}` has no meaning with strategy="{strategy}"; leave one of the two out')
        return _by_family(scores, strategy)
    if modules is not None or max_nfn is not None:
        return _by_module(scores, modules, max_nfn, strategy, seed)
    return _by_type(scores, DEFAULT_TYPES if types is None else types, strategy, seed)


def _by_type(scores: Scores, types: int | Sequence[str], strategy: str, seed: int) -> Placement:
    ranked = list(scores.types)
    if not ranked:
        raise InputError("`scores` has no module type the published script knows; score without compat")
    if isinstance(types, str):
        types = [types]
    if isinstance(types, Sequence):
        if not types:
            raise InputError(f"`types` is empty; name some of {', '.join(sorted(ranked))}")
        unknown = sorted(set(types) - set(ranked))
        if unknown:
            raise InputError(f"`types`: there is no type `{unknown[0]}`; there are {', '.join(sorted(ranked))}")
        if strategy != "lowest":
            raise InputError(f'`types` names its types; strategy="{strategy}" has nothing to choose, leave it out')
        return _placement(scores, [label for label in ranked if label in set(types)], "types", "+".join(types))
    if isinstance(types, bool) or not isinstance(types, Integral) or not 1 <= types <= len(ranked):
        raise InputError(f"`types` must be between 1 and {len(ranked)}, the number of module types, got {types}")
    if strategy == "inverse":
        ranked.reverse()
    elif strategy == "random":
        random.Random(seed).shuffle(ranked)
    return _placement(scores, ranked[:types], strategy, _label(strategy, types, seed))


def _by_module(
    scores: Scores, modules: int | float | None, max_nfn: float | None, strategy: str, seed: int
) -> Placement:
    nfn = scores.nfn
    total = len(nfn)
    order = np.argsort(nfn, kind="stable")
    if strategy == "inverse":
        order = order[::-1]
    elif strategy == "random":
        order = np.array(random.Random(seed).sample(range(total), total))
    if max_nfn is not None:
        if strategy != "lowest":
            raise InputError(f'`max_nfn` is a threshold; strategy="{strategy}" has nothing to choose, leave it out')
        chosen = [int(i) for i in order if nfn[i] <= max_nfn]
        if not chosen:
            raise InputError(f"`max_nfn`={max_nfn} selects nothing; the lowest module has NFN {nfn.min():.4g}")
        return _placement_of_modules(scores, chosen, "modules", f"nfn<={max_nfn:g}")
    assert modules is not None
    if isinstance(modules, bool) or not isinstance(modules, Real):
        raise InputError(f"`modules` must be a count or a fraction, got {modules!r}")
    if not isinstance(modules, Integral):
        if not 0 < modules <= 1:
            raise InputError(f"`modules` as a fraction must be in (0, 1], got {modules}")
        count, label = max(1, round(modules * total)), f"{float(modules):.0%} of modules"
    else:
        count, label = int(modules), f"{modules} modules"
    if not 1 <= count <= total:
        raise InputError(f"`modules` must be between 1 and {total}, the number of scored modules, got {modules}")
    prefix = "" if strategy == "lowest" else f"{strategy} "
    return _placement_of_modules(scores, [int(i) for i in order[:count]], strategy, prefix + label)


def _by_family(scores: Scores, strategy: str) -> Placement:
    labels = [score.type for score in scores.by_type() if strategy in ("all", score.family)]
    if not labels:
        raise InputError(
            f'strategy="{strategy}" selects nothing: no module type is recognised as {strategy}; '
            f"name the types ({', '.join(sorted(scores.types))})"
        )
    return _placement(scores, labels, strategy, "all-linear" if strategy == "all" else strategy)


def _placement(scores: Scores, labels: Sequence[str], strategy: str, label: str) -> Placement:
    def wanted(name: str, module_type: str) -> bool:
        return any(group in name for group in labels) if scores.paper_script else module_type in labels

    chosen = [i for i, module in enumerate(scores.modules) if wanted(module.name, module.type)]
    return _make(scores, chosen, tuple(labels), strategy, label)


def _placement_of_modules(scores: Scores, chosen: list[int], strategy: str, label: str) -> Placement:
    held = {scores.modules[i].type for i in chosen}
    return _make(scores, chosen, tuple(t for t in scores.types if t in held), strategy, label)


def _make(scores: Scores, chosen: list[int], types: tuple[str, ...], strategy: str, label: str) -> Placement:
    modules = [scores.modules[i] for i in sorted(chosen)]
    emitted = targets_of(modules, scores.modules)
    return Placement(
        modules=tuple(module.name for module in modules),
        types=types,
        strategy=strategy,
        label=label,
        shapes={module.name: (module.in_features, module.out_features) for module in modules},
        model=str(scores.provenance["model"]["class"]),
        emitted=emitted,
        notes=notes_of(modules, emitted),
    )


def _label(strategy: str, count: int, seed: int) -> str:
    return f"random-{count} (seed {seed})" if strategy == "random" else f"{strategy}-{count}"
