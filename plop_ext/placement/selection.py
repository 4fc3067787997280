"""The choice of modules from scores: a pure function, without a model and without PEFT."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral

import numpy as np

from plop_ext import quantities
from plop_ext._warnings import warn
from plop_ext.arguments import check_choice, check_flags, check_number, check_seed, check_type, check_whole
from plop_ext.errors import InputError
from plop_ext.module_types import without_role
from plop_ext.placement.budget import Budget, fit, make_budget, most_types
from plop_ext.placement.enough_samples import warn_of_too_few_samples
from plop_ext.placement.evidence import Evidence
from plop_ext.placement.fingerprint import fingerprints_of
from plop_ext.placement.placement import Placement
from plop_ext.placement.ranks import DEFAULT_RANK, check_rank, inverse_nfn, most_common
from plop_ext.placement.serving import ENGINES
from plop_ext.placement.targets import left_out, lines_of_experts, notes_of, targets_of
from plop_ext.score_data import ScoreData, ScoredModule, TypeScore, check_number_of_types, no_place_lines
from plop_ext.statistics import DEFAULT_TYPES, AutoK, auto_k

STRATEGIES = ("lowest", "inverse", "attention", "mlp", "all", "random")
RANKS = (None, "inverse-nfn")


def select(
    scores: ScoreData,
    *,
    types: int | str | Sequence[str] | None,
    modules: int | float | str | None,
    max_nfn: float | None,
    strategy: str,
    seed: int,
    r: int | None,
    ranks: str | None,
    max_params: int | float | str | None,
    max_memory: int | float | str | None,
    batch: int,
    seq: int,
    ignore_nonfinite: bool,
    serve: str | None = None,
) -> Placement:
    """Choose modules from scores; see `Scores.place`."""
    if scores.nonfinite is not None and not ignore_nonfinite:
        raise InputError(
            f"{scores.nonfinite}: a broken model is not placed; mend the checkpoint, score with another `dtype`, or "
            "set `ignore_nonfinite`"
        )
    check_choice(STRATEGIES, strategy=strategy)
    check_choice(RANKS, ranks=ranks)
    check_choice((None, *ENGINES), serve=serve)
    if serve is not None and ranks is not None and not ENGINES[serve].ranks:
        raise InputError(
            f"`ranks`: {ENGINES[serve].title} applies one rank to all modules; leave `ranks` out, or serve otherwise"
        )
    check_whole(r=r)
    check_whole(batch=batch, seq=seq, required=True)
    check_seed(seed=seed)
    check_number(max_nfn=max_nfn)
    if types is not None:
        check_type((str, Integral, Sequence), "a number, 'auto' or names of types", types=types)
    check_flags(ignore_nonfinite=ignore_nonfinite)
    amount = None if modules is None else quantities.count_or_share(modules, "modules")
    given = [
        name for name, value in (("types", types), ("modules", modules), ("max_nfn", max_nfn)) if value is not None
    ]
    if len(given) > 1:
        raise InputError(f"`{given[0]}` and `{given[1]}` exclude each other; give one")
    if strategy in ("attention", "mlp", "all") and given:
        raise InputError(f'`{given[0]}` has no meaning with strategy="{strategy}"; leave one of the two out')
    budget = make_budget(scores, max_params, max_memory, batch, seq)
    candidates: list[Callable[[], Placement]]
    reason = ""
    if strategy in ("attention", "mlp", "all"):
        candidates = [partial(_by_family, scores, strategy)]
    elif modules is not None or max_nfn is not None:
        _require_signal(scores, strategy, asked=True)
        candidates = [partial(_by_module, scores, amount, max_nfn, strategy, seed)]
    elif types is None or types == "auto":
        _require_signal(scores, strategy, asked=False)
        auto = None if types is None else _automatic(scores, strategy, budget, r)
        count = max(1, min(DEFAULT_TYPES, len(scores.types))) if auto is None else auto.k
        reason = "" if auto is None else f"automatic k is {auto.reason}"
        least = 1 if budget is not None else count
        candidates = [partial(_by_type, scores, k, strategy, seed) for k in range(count, least - 1, -1)]
    else:
        if isinstance(types, Integral):
            _require_signal(scores, strategy, asked=True)
        candidates = [partial(_by_type, scores, types, strategy, seed)]
    if serve is not None:
        candidates = [partial(_served, scores, make, serve) for make in candidates]
    placement = _with_ranks(scores, candidates, budget, r, ranks)
    if serve is not None:
        placement = placement.servable(serve).nearest or placement
    check_rank(r, placement.lora_targets)
    if len(candidates) > 1 and len(placement.types) < len(candidates):
        fewer = f"the budget allows {len(placement.types)} of the {len(candidates)} lowest types"
        reason = f"{reason}; {fewer}" if reason else fewer
    by_score = placement.strategy in ("lowest", "inverse") or max_nfn is not None
    if by_score:
        warn_of_too_few_samples(scores, placement, amount, single=amount is not None or max_nfn is not None)
    return replace(placement, reason=reason, evidence=Evidence.of(scores, placement.types, by_score))


def _served(scores: ScoreData, make: Callable[[], Placement], engine: str) -> Placement:
    """Return the nearest placement to that of `make` that an engine can serve, before ranks are chosen."""
    placement = make()
    nearest = placement.servable(engine).nearest
    if nearest is None:
        reasons = "; ".join(placement.servable(engine).reasons) or "; ".join(placement.notes)
        raise InputError(f"`serve`: {engine} can serve nothing of `{placement.label}`: {reasons}; place other modules")
    return replace(nearest, fingerprints=fingerprints_of(nearest.lora_targets, scores.modules))


def _with_ranks(
    scores: ScoreData,
    candidates: Sequence[Callable[[], Placement]],
    budget: Budget | None,
    r: int | None,
    ranks: str | None,
) -> Placement:
    placement = replace(candidates[0](), r=r or DEFAULT_RANK) if budget is None else fit(candidates, budget, r)
    if ranks is None or not placement.lora_targets:
        return placement
    allowed = placement.num_parameters()

    def fits(other: Placement) -> bool:
        same = other.num_parameters() <= allowed
        return same if budget is None else budget.fits(other) and (r is None or same)

    caps = {target.name: target.max_rank for target in placement.lora_targets}
    uneven = inverse_nfn(caps, _target_nfn(scores, placement), lambda ranks: fits(_at(placement, ranks)))
    return placement if uneven is None else _at(placement, uneven)


def _at(placement: Placement, ranks: dict[str, int]) -> Placement:
    """Return `placement` with a rank for each target; its default rank is the most common one."""
    return replace(placement, r=most_common(ranks), ranks=ranks)


def _target_nfn(scores: ScoreData, placement: Placement) -> dict[str, float]:
    """Return the NFN of each target; for a packed weight, the mean over its chosen parts."""
    chosen, values = set(placement.modules), dict[str, list[float]]()
    for module, value in zip(scores.modules, scores.nfn.tolist(), strict=True):
        if module.name in chosen and not module.target.refused:
            values.setdefault(module.target.name, []).append(value)
    return {name: sum(members) / len(members) for name, members in values.items()}


def _automatic(scores: ScoreData, strategy: str, budget: Budget | None, r: int | None) -> AutoK:
    """Return the result of `auto_k`, with the most types that the budget allows as its fallback."""
    if strategy != "lowest":
        raise InputError(f'`types`="auto" looks for the lowest types; strategy="{strategy}" needs a number')
    fallback = None
    if budget is not None:
        every = [partial(_by_type, scores, k, strategy, 0) for k in range(1, len(scores.types) + 1)]
        fallback = most_types(every, budget, r)
    return auto_k(scores.table, fallback)


def _require_signal(scores: ScoreData, strategy: str, asked: bool) -> None:
    """Refuse to choose by scores without signal; if the user gave a number (`asked`), warn instead."""
    if scores.paper_script or strategy == "random" or scores.signal.found:
        return
    if not asked:
        raise InputError(f"no signal: {scores.signal.reason}; give `types` as a number to place anyway")
    warn(f"no signal: {scores.signal.reason}; placed because a number was given")


def _by_type(scores: ScoreData, types: int | str | Sequence[str], strategy: str, seed: int) -> Placement:
    ranked = list(scores.types)
    if not ranked:
        raise InputError("`scores` has no module type of the published script; score without compat")
    if isinstance(types, str):
        types = [types]
    if isinstance(types, Sequence):
        if not types:
            raise InputError(f"`types` is empty; name some of {', '.join(sorted(ranked))}")
        named = {label for name in types for label in _named(scores, name)}
        if strategy != "lowest":
            raise InputError(f'`types` names the types, so strategy="{strategy}" has no effect; leave `strategy` out')
        labels = [label for label in ranked if label in named]
        return _placement(scores, [*labels, *sorted(named.difference(labels))], "types", "+".join(types))
    check_number_of_types(types, len(ranked))
    if strategy == "inverse":
        ranked.reverse()
    elif strategy == "random":
        random.Random(seed).shuffle(ranked)
    chosen = ranked[:types]
    limit = next(score.nfn for score in scores.by_type() if score.type == chosen[-1])
    notes = _passed_over(scores, lambda item: _before(item.nfn, limit, strategy))
    return _placement(scores, chosen, strategy, _label(strategy, types, seed), notes)


def _named(scores: ScoreData, name: str) -> list[str]:
    """Return the labels that a user's name of a type stands for: one type, or all roles of one.

    A type that PEFT cannot adapt can be named too: the notes of the placement give the reason.
    """
    refused = {module.type for module in scores.modules if _is_refused(module)}
    labels = [label for label in {*scores.types, *refused} if name in (label, without_role(label))]
    if labels:
        return labels
    for item in scores.no_place_by_type():
        if name in (item.type, without_role(item.type)):
            raise InputError(
                f"`types`: `{name}` is no place for LoRA: {item.no_place}; to place LoRA there all the same, score "
                "with `include` (plop score --include)"
            )
    raise InputError(f"`types`: there is no type `{name}`; there are {', '.join(sorted(scores.types))}")


def _before(nfn: float, limit: float, strategy: str) -> bool:
    """Return whether a strategy would choose `nfn` no later than `limit`; a random one has no order."""
    return {"lowest": nfn <= limit, "inverse": nfn >= limit}.get(strategy, False)


def _passed_over(scores: ScoreData, wanted: Callable[[TypeScore], bool]) -> list[str]:
    """Return one line per reason for the types that are wanted, but no place for LoRA."""
    return no_place_lines(item for item in scores.no_place_by_type() if wanted(item))


def _by_module(
    scores: ScoreData, modules: int | float | None, max_nfn: float | None, strategy: str, seed: int
) -> Placement:
    nfn, candidates = scores.nfn, scores.candidates
    total = len(candidates)
    order = candidates[np.argsort(nfn[candidates], kind="stable")]
    if strategy == "inverse":
        order = order[::-1]
    elif strategy == "random":
        order = candidates[random.Random(seed).sample(range(total), total)]
    if max_nfn is not None:
        if strategy != "lowest":
            raise InputError(f'`max_nfn` is a threshold, so strategy="{strategy}" has no effect; leave `strategy` out')
        chosen = [int(i) for i in order if nfn[i] <= max_nfn]
        if not chosen:
            lowest = nfn[candidates].min()
            raise InputError(f"`max_nfn`={max_nfn} selects no module; the lowest NFN is {lowest:.4g}")
        notes = _passed_over(scores, lambda item: item.lowest <= max_nfn)
        return _placement_of_modules(scores, chosen, "modules", f"nfn<={max_nfn:g}", notes)
    assert modules is not None
    if isinstance(modules, float):
        count, label = max(1, round(modules * total)), f"{modules:.0%} of modules"
    else:
        count, label = modules, f"{modules} modules"
    if not 1 <= count <= total:
        raise InputError(f"`modules` must be between 1 and {total}, the number of scored modules, got {modules}")
    prefix = "" if strategy == "lowest" else f"{strategy} "
    limit = nfn[order[count - 1]]
    notes = _passed_over(
        scores, lambda item: _before(item.highest if strategy == "inverse" else item.lowest, limit, strategy)
    )
    return _placement_of_modules(scores, [int(i) for i in order[:count]], strategy, prefix + label, notes)


def _by_family(scores: ScoreData, strategy: str) -> Placement:
    labels = [score.type for score in scores.by_type() if strategy in ("all", score.family)]
    if not labels:
        raise InputError(
            f'strategy="{strategy}" selects nothing: no module type is recognized as {strategy}; '
            f"name the types ({', '.join(sorted(scores.types))})"
        )
    notes = _passed_over(scores, lambda item: strategy in ("all", item.family))
    placement = _placement(scores, labels, strategy, "all-linear" if strategy == "all" else strategy, notes)
    if strategy != "all":
        return placement
    return replace(placement, notes=(*placement.notes, *lines_of_experts(scores, placement.lora_targets)))


def _placement(
    scores: ScoreData, labels: Sequence[str], strategy: str, label: str, notes: Sequence[str] = ()
) -> Placement:
    def wanted(name: str, module_type: str) -> bool:
        return any(group in name for group in labels) if scores.paper_script else module_type in labels

    chosen = [
        i
        for i, module in enumerate(scores.modules)
        if (not module.no_place or _is_refused(module)) and wanted(module.name, module.type)
    ]
    return _make(scores, chosen, tuple(labels), strategy, label, notes)


def _is_refused(module: ScoredModule) -> bool:
    """Return whether a module does not compete for the only reason that PEFT cannot adapt it."""
    return bool(module.no_place) and module.no_place == module.target.refused


def _placement_of_modules(
    scores: ScoreData, chosen: list[int], strategy: str, label: str, notes: Sequence[str]
) -> Placement:
    held = {scores.modules[i].type for i in chosen}
    return _make(scores, chosen, tuple(t for t in scores.types if t in held), strategy, label, notes)


def _make(
    scores: ScoreData, chosen: list[int], types: tuple[str, ...], strategy: str, label: str, notes: Sequence[str]
) -> Placement:
    modules = [scores.modules[i] for i in sorted(chosen)]
    targets = targets_of(modules)
    return Placement(
        modules=tuple(module.name for module in modules),
        types=types,
        strategy=strategy,
        label=label,
        model=str(scores.provenance["model"]["class"]),
        lora_targets=targets,
        fingerprints=fingerprints_of(targets, scores.modules),
        notes=(*notes_of(modules, scores.modules), *notes),
        left_out=left_out(targets, scores),
        unscored=tuple(item.name for item in scores.unscored),
    )


def _label(strategy: str, count: int, seed: int) -> str:
    return f"random-{count} (seed {seed})" if strategy == "random" else f"{strategy}-{count}"
