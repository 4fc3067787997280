"""The merge of runs of one model over different data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from plop_ext.arguments import check_choice, shown
from plop_ext.errors import InputError
from plop_ext.score_data import FewTokenModules, ScoreData, ScoredModule
from plop_ext.score_data.modules import MIN_EXPERT_TOKENS, few_routed_detail
from plop_ext.score_data.settings import MUST_AGREE
from plop_ext.totals import Totals

# Devices and kernels differ by rounding errors; checkpoints differ by far more.
_BASELINE_TOLERANCE = 1e-4

ScoresT = TypeVar("ScoresT", bound=ScoreData)


def merge(cls: type[ScoresT], parts: Sequence[ScoreData], order: str = "given") -> ScoresT:
    """Merge runs into a `cls`; see `Scores.merge`."""
    check_choice(("given", "ids"), order=order)
    if not isinstance(parts, Sequence) or not all(isinstance(part, ScoreData) for part in parts):
        raise InputError(f"`parts` must be a list of scores, got {shown(parts)}")
    if not parts:
        raise InputError("`merge` got no scores; give at least one")
    first = parts[0]
    tables = [_everything(part) for part in parts]
    for number, other in enumerate(parts[1:], start=2):
        _check(first, other, number, tables[0][0], tables[number - 1][0])
    seen: dict[tuple[str | None, int], int] = {}
    for number, part in enumerate(parts, start=1):
        for data, sample in zip(part.sample_data, part.sample_ids.tolist(), strict=True):
            if (data, sample) in seen:
                source = "of unnamed data" if data is None else f"of `{data}`"
                raise InputError(
                    f"sample {sample} {source} is in scores {seen[(data, sample)]} and {number}: it would count "
                    "twice; merge runs over different samples, or give each data set its own `data_name`"
                )
            seen[(data, sample)] = number
    batches, offset = [], 0
    for part in parts:
        batches.append(part.sample_batches + offset)
        offset += int(part.sample_batches.max()) + 1
    modules, totals = tables[0][0], Totals.join_samples([table for _, table in tables])
    ids = np.concatenate([part.sample_ids for part in parts])
    names = [name for part in parts for name in part.sample_data]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    chosen = np.arange(len(ids))
    if order == "ids":
        chosen = np.lexsort((ids, np.array([places[name] for name in names])))
    totals = totals.of_samples(chosen)
    experts = {module.name for part in parts if part.few_tokens is not None for module in part.few_tokens.modules}
    tokens = totals.tokens.sum(axis=1)
    few = [i for i, module in enumerate(modules) if module.name in experts and tokens[i] < MIN_EXPERT_TOKENS]
    kept = [i for i in range(len(modules)) if i not in set(few)]
    details = {modules[i].name: few_routed_detail(tokens[i]) for i in few}
    unscored = [item for item in first.unscored if item.name not in experts or item.name in details]
    return cls(
        tuple(modules[i] for i in kept),
        totals.of_modules(kept),
        ids[chosen],
        np.concatenate(batches)[chosen],
        tuple(replace(item, detail=details.get(item.name, item.detail)) for item in unscored),
        _provenance(parts, places if order == "ids" else None),
        FewTokenModules(tuple(modules[i] for i in few), totals.of_modules(few), tuple(few)) if few else None,
    )


def _everything(part: ScoreData) -> tuple[list[ScoredModule], Totals]:
    """Put the scored modules and those with too few tokens into the model's order, with their totals."""
    few = part.few_tokens
    if few is None:
        return list(part.modules), part.totals
    size = len(part.modules) + len(few.modules)
    placed = list(few.positions)
    order = np.empty(size, dtype=np.int64)
    order[[i for i in range(size) if i not in set(placed)]] = np.arange(len(part.modules))
    order[placed] = np.arange(len(part.modules), size)
    modules = [*part.modules, *few.modules]
    return [modules[i] for i in order], Totals.join_modules([part.totals, few.totals]).of_modules(order)


def _check(
    first: ScoreData, other: ScoreData, number: int, modules: Sequence[ScoredModule], others: Sequence[ScoredModule]
) -> None:
    names = [module.name for module in modules], [module.name for module in others]
    if names[0] != names[1]:
        difference = sorted(set(names[0]) ^ set(names[1]))
        example = f" (`{difference[0]}`)" if difference else ""
        raise InputError(f"scores {number} hold other modules than the first{example}; merge runs of one model")
    for key in ("class", "parameters"):
        values = first.provenance["model"].get(key), other.provenance["model"].get(key)
        if values[0] != values[1]:
            raise InputError(f"scores {number} are of another model: {key} {values[1]}, not {values[0]}")
    for key in MUST_AGREE:
        values = first.provenance["settings"].get(key), other.provenance["settings"].get(key)
        if values[0] != values[1]:
            raise InputError(
                f"scores {number} have {key}={values[1]}, the first {key}={values[0]}; use the same settings"
            )
    baselines = np.array([[module.baseline for module in run] for run in (modules, others)])
    far = np.abs(baselines[1] / baselines[0] - 1) > _BASELINE_TOLERANCE
    if far.any():
        name = modules[int(far.argmax())].name
        raise InputError(f"scores {number} have another weight in `{name}` than the first; merge runs of one model")


def _provenance(parts: Sequence[ScoreData], places: Mapping[str | None, int] | None) -> dict[str, Any]:
    sources: list[dict[str, Any]] = []
    for part in parts:
        data = part.provenance["data"]
        sources += data.get("parts") or [{**data, "samples": len(part.sample_ids)}]
    if places is not None:
        sources.sort(key=lambda source: places[source["name"]])
    names = list(dict.fromkeys(source["name"] for source in sources if source["name"]))
    data = {
        "name": " + ".join(names) or None,
        "samples": sum(source["samples"] for source in sources),
        "parts": sources,
    }
    seconds = [part.provenance.get("seconds") for part in parts]
    merged = {**parts[0].provenance, "data": data, "merged": len(parts)}
    merged.pop("stop", None)
    merged.pop("seconds", None)  # the first run's alone would be too few
    found = [part.provenance.get("forward") or {} for part in parts]
    ways = [{name: value for name, value in way.items() if name != "why"} for way in found]
    if any(way != ways[0] for way in ways):
        merged["forward"] = {"mixed": ways}
    broken = next((part.nonfinite for part in parts if part.nonfinite), None)
    if broken is not None:
        merged["nonfinite"] = broken
    if None not in seconds:
        merged["seconds"] = round(sum(value for value in seconds if value is not None), 3)
    return merged
