"""From the journal to one result file per model, which is what the analysis reads and the repository keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.placement.journal import Journal, Record
from benchmarks.placement.settings import Settings

COLUMNS = (
    "task",
    "protocol",
    "placement",
    "rate",
    "seed",
    "validation_loss",
    "validation_exact",
    "test_loss",
    "test_exact",
    "parameters",
    "capped",
    "environment",
)
_LISTS = ("features", "selections", "stability", "runs")  # written one item a line


def main(work: Path, results: Path, settings: Settings, models: Sequence[str], quick: bool) -> None:
    """Write `results`/MODEL.json for every model of which the journal has something."""
    journal = Journal(work / "journal.jsonl")
    corpus, environments = journal.read("corpus"), journal.read("environment")
    sizes = {name: value for name, value in asdict(settings).items() if name != "models"}
    results.mkdir(parents=True, exist_ok=True)
    for name in models:
        pretraining = journal.read("pretraining", model=name)
        if not pretraining:
            continue
        kinds = ("features", "selection", "stability", "run")
        features, selections, stability, runs = (journal.read(kind, model=name) for kind in kinds)
        used = {
            record["environment"]
            for record in [corpus[-1], pretraining[-1], *features, *selections, *stability, *runs]
        }
        result: dict[str, Any] = {
            "benchmark": "placement",
            "quick": quick,
            "model": name,
            "environments": [_without(each, "kind") for each in environments if each["number"] in used],
            "settings": sizes,
            "corpus": _without(corpus[-1], "kind"),
            "pretraining": _without(pretraining[-1], "kind", "model"),
            "features": [_without(each, "kind", "model") for each in features],
            "selections": [_without(each, "kind", "model") for each in selections],
            "stability": [_without(each, "kind", "model") for each in stability],
            "columns": list(COLUMNS),
            "runs": [_row(record) for record in _once(runs)],
        }
        path = results / f"{name}.json"
        path.write_text(_text(result), encoding="utf-8")
        print(f"wrote {path.name}: {len(result['runs'])} runs")


def _once(runs: Iterable[Record]) -> list[Record]:
    """The first record of every run: two calls may have done the same one."""
    found: dict[tuple[Any, ...], Record] = {}
    for run in runs:
        found.setdefault(tuple(run[column] for column in COLUMNS[:5]), run)
    return list(found.values())


def _row(record: Record) -> list[Any]:
    return [_short(record[column]) for column in COLUMNS]


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _without(record: Record, *names: str) -> Record:
    return {name: value for name, value in record.items() if name not in names}


def _text(result: dict[str, Any]) -> str:
    """JSON with one item of a long list in a line."""
    parts = []
    for name, value in result.items():
        if name in _LISTS and value:
            lines = ",\n  ".join(json.dumps(each, allow_nan=False) for each in value)
            parts.append(f' "{name}": [\n  {lines}\n ]')
        else:
            parts.append(f' "{name}": {json.dumps(value, allow_nan=False)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
