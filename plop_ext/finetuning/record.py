"""What a finetuning run leaves beside its adapter: `result.json` for programs, and a card for readers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plop_ext.data import Encoded
from plop_ext.data.held_out import data_hash
from plop_ext.files import write_text_atomic
from plop_ext.placement.data import PlacementData
from plop_ext.placement.evidence import Evidence
from plop_ext.provenance import versions

FORMAT = "plop_ext.adapter"
FORMAT_VERSION = 2
# Fields of the placement that readers of the record want; the file of the placement has all.
_PLACEMENT = ("label", "strategy", "types", "modules", "ranks", "reason", "notes")


def make_record(
    model: Mapping[str, Any],
    placement: PlacementData,
    train: Sequence[Encoded],
    eval: Sequence[Encoded],
    result: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all that a run depended on and came to, ready for JSON.

    Times are left out, so that the same run writes the same bytes.

    Args:
        model: Description of the model without the adapter, from `describe_model`.
        placement: What was adapted.
        train: Samples trained on.
        eval: Held-out samples measured.
        result: Losses, rank and steps, from `FinetuneResult.to_dict`.
        settings: Arguments of the training.
    """
    data = {"train": train, "eval": eval}
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": dict(model),
        "placement": {name: getattr(placement, name) for name in _PLACEMENT}
        | {"evidence": None if placement.evidence is None else vars(placement.evidence)},
        "data": {name: {"samples": len(rows), "hash": data_hash(rows)} for name, rows in data.items()},
        "result": {name: value for name, value in result.items() if name not in ("seconds", "output_dir")},
        "settings": dict(settings),
        "versions": versions(),
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `result.json` and the card README.md, which replaces PEFT's empty one, into a folder."""
    write_text_atomic(folder / "result.json", json.dumps(record, indent=1, allow_nan=False, default=str) + "\n")
    write_text_atomic(folder / "README.md", card(record))


def card(record: Mapping[str, Any]) -> str:
    """Return the card of an adapter, with the fields that model hubs read at its top."""
    model, placement, result, data = (record[name] for name in ("model", "placement", "result", "data"))
    base = model["name"] or model["class"]
    evidence = None if placement["evidence"] is None else Evidence(**placement["evidence"])
    remarks = [*placement["notes"], *(() if evidence is None else evidence.doubts)]
    rows = [
        ("base model", f"{base} ({model['class']}, {model['parameters']:,} parameters)"),
        ("placement", f"{placement['label']}: {', '.join(placement['types'])} ({len(placement['modules'])} modules)"),
        ("chosen from", "no scores" if evidence is None else evidence.sentence()),
        ("rank", f"{result['r']}, {result['trainable_params']:,} trainable parameters"),
        (
            "held-out loss",
            f"{_loss(result['loss_before'])} before, {_loss(result['loss_after'])} after, nats per token",
        ),
        ("training", f"{result['steps']} steps, learning rate {result['learning_rate']:g}, seed {result['seed']}"),
        ("data", "; ".join(f"{name}: {item['samples']} samples, hash {item['hash']}" for name, item in data.items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
    ]
    return "\n".join(
        [
            "---",
            # A string in JSON is one in YAML, whatever its characters are.
            *([f"base_model: {json.dumps(model['name'])}"] if model["name"] else []),
            "library_name: peft",
            "tags: [lora, plop]",
            "---",
            "",
            f"# LoRA adapter for {_cell(base)}",
            "",
            "The placement says which modules are adapted, and how they were chosen: by the scores of "
            "[PLoP](https://arxiv.org/abs/2506.20629) or otherwise. `result.json` has the names of all modules.",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {_cell(text)} |" for name, text in rows),
            *(["", *(f"- {_cell(remark)}" for remark in remarks)] if remarks else []),
            "",
        ]
    )


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
