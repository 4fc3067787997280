"""The JSON form of scores: the totals, and derived figures for other readers of the file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from plop_ext.errors import InputError
from plop_ext.files import read_json, uncollected, write_json
from plop_ext.lora_target import LoraTarget
from plop_ext.score_data import FewTokenModules, ScoreData, ScoredModule
from plop_ext.totals import TOTALS_FIELDS, Totals
from plop_ext.unscored import UnscoredModule

FORMAT = "plop_ext.scores"
FORMAT_VERSION = 4
# The fields of the stop rule's report that reports read.
_STOP = {"available", "stability", "settled", "settled_at", "samples", "types", "modules"}

_HALVES = re.compile("[\ud800-\udfff]")

ScoresT = TypeVar("ScoresT", bound=ScoreData)


def write(scores: ScoreData, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write JSON to `path`; see `Scores.save`."""
    statistics = None if scores.paper_script else scores.statistics()
    modules = _with_totals(scores.modules, scores.totals)
    if statistics is not None and statistics.samples > 1:
        for place, pair in zip(scores.candidates.tolist(), statistics.module_intervals.tolist(), strict=True):
            modules[place]["nfn_interval"] = pair
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "provenance": dict(scores.provenance),
        "types": [vars(score) for score in (*scores.by_type(), *scores.no_place_by_type())],
        "statistics": None if statistics is None else statistics.to_dict(),
        "samples": {"ids": scores.sample_ids.tolist(), "batches": scores.sample_batches.tolist()},
        "modules": modules,
        "unscored": [vars(item) for item in scores.unscored],
        "few_tokens": None
        if scores.few_tokens is None
        else {
            "modules": _with_totals(scores.few_tokens.modules, scores.few_tokens.totals),
            "positions": scores.few_tokens.positions,
        },
    }
    write_json(path, content, overwrite)


def _with_totals(modules: Sequence[ScoredModule], totals: Totals) -> list[dict[str, Any]]:
    fields = totals.fields()
    return [
        {
            **vars(module),
            "target": module.target.to_dict(),
            "totals": {name: table[index].tolist() for name, table in fields.items()},
        }
        for index, module in enumerate(modules)
    ]


def read(cls: type[ScoresT], path: str | os.PathLike[str]) -> ScoresT:
    """Read a file that `write` wrote as a `cls`; derived figures are recomputed."""
    content = read_json(path, FORMAT, FORMAT_VERSION, "`plop score`")
    try:
        with uncollected():
            scores = _parse(cls, content)
            _check(scores)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"`{path}` is a damaged scores file; write it again with `plop score`") from error
    return scores


def _parse(cls: type[ScoresT], content: dict[str, Any]) -> ScoresT:
    modules, totals = _parse_modules(content["modules"])
    few, lists = content["few_tokens"], content["samples"]
    return cls(
        modules=modules,
        totals=totals,
        sample_ids=_numbers(lists["ids"], np.int64),
        sample_batches=_numbers(lists["batches"], np.int64),
        unscored=tuple(UnscoredModule(**item) for item in content["unscored"]),
        provenance=content["provenance"],
        few_tokens=None if few is None else FewTokenModules(*_parse_modules(few["modules"]), tuple(few["positions"])),
    )


def _parse_modules(entries: list[dict[str, Any]]) -> tuple[tuple[ScoredModule, ...], Totals]:
    tables = [module.pop("totals") for module in entries]
    for module in entries:
        module.pop("nfn_interval", None)
        module["target"] = LoraTarget.from_dict(module["target"])
    modules = (ScoredModule(**module) for module in entries)
    fields = {name: _numbers([table[name] for table in tables], np.int64, np.float64) for name in TOTALS_FIELDS}
    return tuple(modules), Totals.from_fields(fields)


def _numbers(values: Any, *dtypes: type[Any]) -> NDArray[Any]:
    """Return an array of the last dtype; refuse what numpy reads as none of `dtypes`, such as `null` and strings."""
    array = np.array(values)
    _require(array.dtype in dtypes)
    return array.astype(dtypes[-1])


def _check(scores: ScoreData) -> None:
    """Raise for values that no scoring run gives, because a placement would use them."""
    few = scores.few_tokens
    for module in (*scores.modules, *(() if few is None else few.modules)):
        sizes = (module.in_features, module.out_features)
        _require(all(type(size) is int and size > 0 for size in sizes))
        _require(module.layer is None or (type(module.layer) is int and abs(module.layer) < 2**31))
        texts = (module.name, module.type, module.kind, module.baseline_from, module.no_place)
        _require(all(_is_text(text) for text in texts))
        _require(_is_number(module.baseline) and module.baseline > 0)
        _require(module.weight_norm is None or _is_number(module.weight_norm))
    for item in scores.unscored:
        _require(all(_is_text(text) for text in (item.name, item.layer_class, item.reason, item.detail)))
        _require(type(item.wanted) is bool)
    samples = scores.totals.values.shape[1]
    _require(scores.sample_ids.shape == scores.sample_batches.shape == (samples,))
    _check_totals(scores.totals, len(scores.modules), samples)
    _require(bool((scores.totals.tokens.sum(axis=1) > 0).all()))
    _require(len(scores.candidates) > 0)
    if few is not None:
        _check_totals(few.totals, len(few.modules), samples)
        count = len(scores.modules) + len(few.modules)
        _require(all(type(position) is int and 0 <= position < count for position in few.positions))
        _require(len(set(few.positions)) == len(few.modules) == len(few.positions))
    _check_provenance(scores.provenance)
    _require(len(scores.sample_data) == samples)
    _require(bool(np.isfinite(scores.nfn).all()))


def _check_totals(totals: Totals, modules: int, samples: int) -> None:
    values = totals.values
    _require(values.shape[:-1] == (modules, samples))
    _require(bool(np.isfinite(values).all() and (values >= 0).all()))


def _check_provenance(provenance: Any) -> None:
    """Raise if the provenance lacks fields that placements and reports read."""
    model, data = provenance["model"], provenance["data"]
    _require(_is_text(model["class"]))
    _require(all(model.get(name) is None or _is_text(model[name]) for name in ("name", "type", "dtype")))
    _require(all(model.get(name) is None or type(model[name]) is int for name in ("parameters", "weight_bytes")))
    _require(all(part["name"] is None or _is_text(part["name"]) for part in (data, *data.get("parts", ()))))
    _require(type(data["samples"]) is int)
    _require(provenance["settings"]["compat"] in (None, "paper-script"))
    _require(provenance.get("seconds") is None or _is_number(provenance["seconds"]))
    stop = provenance.get("stop")
    if stop is not None:
        _require(set(stop) >= _STOP)
        _require(all(stop[name] is None or _is_number(stop[name]) for name in ("stability", "settled_at")))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    """Return whether a value is text that can be written and drawn: without halves of characters."""
    return isinstance(value, str) and (value.isascii() or not _HALVES.search(value))


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError
