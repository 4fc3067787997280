"""Adding runs of one model over different data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from plop_ext.errors import InputError

if TYPE_CHECKING:
    from plop_ext.scores.scores import Scores

# What two runs must share to be one statistic. The cap, the stop rule and the seed of the token phase need not agree.
SETTINGS = ("mask", "baseline", "probes", "include", "exclude", "compat")
# Devices and kernels differ by rounding; another checkpoint differs by far more.
_BASELINE_TOLERANCE = 1e-4


def merge(parts: Sequence[Scores]) -> Scores:
    """Add runs; see `Scores.merge`."""
    from plop_ext.scores.scores import Scores

    if not parts:
        raise InputError("`merge` got no scores; give at least one")
    first = parts[0]
    for number, other in enumerate(parts[1:], start=2):
        _check(first, other, number)
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
    return Scores(
        first.modules,
        np.concatenate([part.totals for part in parts], axis=1),
        np.concatenate([part.sample_ids for part in parts]),
        np.concatenate(batches),
        first.unscored,
        _provenance(parts),
    )


def _check(first: Scores, other: Scores, number: int) -> None:
    if first.module_names != other.module_names:
        difference = sorted(set(first.module_names) ^ set(other.module_names))
        example = f" (`{difference[0]}`)" if difference else ""
        raise InputError(f"scores {number} hold other modules than the first{example}; merge runs of one model")
    for key in ("class", "parameters"):
        values = first.provenance["model"].get(key), other.provenance["model"].get(key)
        if values[0] != values[1]:
            raise InputError(f"scores {number} are of another model: {key} {values[1]}, not {values[0]}")
    for key in SETTINGS:
        values = first.provenance["settings"].get(key), other.provenance["settings"].get(key)
        if values[0] != values[1]:
            raise InputError(f"scores {number} have {key}={values[1]}, the first {key}={values[0]}; score alike")
    far = np.abs(other.baseline / first.baseline - 1) > _BASELINE_TOLERANCE
    if far.any():
        name = first.modules[int(far.argmax())].name
        raise InputError(f"scores {number} have another weight in `{name}` than the first; merge runs of one model")


def _provenance(parts: Sequence[Scores]) -> dict[str, Any]:
    sources: list[dict[str, Any]] = []
    for part in parts:
        data = part.provenance["data"]
        sources += data.get("parts") or [{**data, "samples": len(part.sample_ids)}]
    names = list(dict.fromkeys(source["name"] for source in sources if source["name"]))
    data = {
        "name": " + ".join(names) or None,
        "samples": sum(source["samples"] for source in sources),
        "parts": sources,
    }
    seconds = [part.provenance.get("seconds") for part in parts]
    merged = {**parts[0].provenance, "data": data, "merged": len(parts)}
    merged.pop("stop", None)
    if None not in seconds:
        merged["seconds"] = round(sum(value for value in seconds if value is not None), 3)
    return merged
