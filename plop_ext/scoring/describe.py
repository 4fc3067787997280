"""The provenance of a scoring run: model, data, settings and software."""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Mapping
from typing import Any

import torch

from plop_ext import ops
from plop_ext.arguments import check_type
from plop_ext.errors import InputError
from plop_ext.forwards.rule import Way
from plop_ext.provenance import versions
from plop_ext.score_data.settings import Settings
from plop_ext.scoring.outcome import Outcome


def check_data_info(data_info: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the caller wants recorded of the data; refused before the run if no file could hold it."""
    check_type((Mapping, type(None)), "a dict of plain JSON values", data_info=data_info)
    try:
        return json.loads(json.dumps(dict(data_info or {})))
    except (TypeError, ValueError) as error:
        raise InputError(f"`data_info` must be a dict of plain JSON values ({error})") from error


def describe_run(
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    settings: Settings,
    outcome: Outcome,
    device: torch.device,
    started: float,
    stop: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe a run that began at `started` (`time.perf_counter`) and ended as `stop` reports.

    Args:
        model: The description of the model by `plop_ext.provenance.describe_model`.
        data: `name` and `hash` of the data, and further facts.
        settings: The settings of the run.
        outcome: The numbers of the run.
        device: The device of the run.
        started: Start of the run.
        stop: The report of the stop rule; None without one.
    """
    return {
        "model": _readable(dict(model)),
        "data": _readable({**data, "samples": len(outcome.ids)}),
        "settings": settings.to_dict(),
        "stop": stop,
        "experts_implementation": outcome.experts_implementation,
        "backend": ops.STATUS.backend(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": dict(versions()),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 3),
    }


def described_way(way: Way, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry `forward` of the provenance: equal entries `hooks` and `fast` promise equal bits.

    Args:
        way: What was chosen.
        report: What `Forwards.report` returns at the end of the run.
    """
    fast = report.get("fast") is not None and report["fast"]["blocks"] > 0
    graph = report.get("graph") is not None and report["graph"]["replayed"] > 0
    return {"hooks": not fast, "fast": fast, "graph": graph, "why": way.why}


def _readable(value: Any) -> Any:
    """Return plain data with halves of characters, as in file names that are no UTF-8, as escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _readable(item) for key, item in value.items()}
    return [_readable(item) for item in value] if isinstance(value, list) else value
