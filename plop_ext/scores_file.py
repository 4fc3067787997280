"""The JSON form of scores: totals, from which all else follows, and what is derived from them for other readers."""

from __future__ import annotations

import json
import os

import numpy as np

from plop_ext.errors import InputError
from plop_ext.files import read_json, write_text_atomic
from plop_ext.scores import ScoredModule, Scores, UnscoredModule
from plop_ext.totals import TOTALS_FIELDS

FORMAT = "plop_ext.scores"
FORMAT_VERSION = 1


def write(scores: Scores, path: str | os.PathLike[str]) -> None:
    """Write JSON to `path`, whole or not at all."""
    statistics = None if scores.paper_script else scores.statistics()
    modules = [
        {
            **vars(module),
            "totals": {field: row.tolist() for field, row in zip(TOTALS_FIELDS, table.T, strict=True)},
        }
        for module, table in zip(scores.modules, scores.totals, strict=True)
    ]
    if statistics is not None and statistics.samples > 1:
        for entry, pair in zip(modules, statistics.module_intervals.tolist(), strict=True):
            entry["nfn_interval"] = pair
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "provenance": dict(scores.provenance),
        "types": [vars(score) for score in scores.by_type()],
        "statistics": None if statistics is None else statistics.to_dict(),
        "samples": {"ids": scores.sample_ids.tolist(), "batches": scores.sample_batches.tolist()},
        "modules": modules,
        "unscored": [vars(item) for item in scores.unscored],
    }
    write_text_atomic(path, json.dumps(content, indent=1) + "\n")


def read(path: str | os.PathLike[str]) -> Scores:
    """Read what `write` wrote; the derived parts are computed anew."""
    content = read_json(path, FORMAT, FORMAT_VERSION, "`plop score`")
    try:
        tables = [module.pop("totals") for module in content["modules"]]
        for module in content["modules"]:
            module.pop("nfn_interval", None)
        totals = [[table[field] for field in TOTALS_FIELDS] for table in tables]
        lists = content["samples"]
        scores = Scores(
            modules=tuple(
                ScoredModule(**{**module, "target_shape": tuple(module["target_shape"])})
                for module in content["modules"]
            ),
            totals=np.array(totals, dtype=np.float64).transpose(0, 2, 1).copy(),
            sample_ids=np.array(lists["ids"], dtype=np.int64),
            sample_batches=np.array(lists["batches"], dtype=np.int64),
            unscored=tuple(UnscoredModule(**item) for item in content["unscored"]),
            provenance=content["provenance"],
        )
        samples = scores.totals.shape[1]
        if scores.sample_ids.shape != (samples,) or scores.sample_batches.shape != (samples,):
            raise ValueError
        if len(scores.sample_data) != samples:
            raise ValueError
        scores.by_type()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"`{path}` is a damaged scores file; write it again with `plop score`") from error
    return scores
