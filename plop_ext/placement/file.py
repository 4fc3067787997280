"""The JSON form of placements."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from plop_ext.errors import InputError
from plop_ext.files import read_json, write_json
from plop_ext.lora_target import LoraTarget
from plop_ext.placement.data import PlacementData
from plop_ext.placement.evidence import Evidence
from plop_ext.placement.fingerprint import Fingerprint

FORMAT = "plop_ext.placement"
FORMAT_VERSION = 4

PlacementT = TypeVar("PlacementT", bound=PlacementData)


def write(placement: PlacementData, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write JSON to `path`; see `Placement.save`."""
    content = {"format": FORMAT, "version": FORMAT_VERSION, **_fields(placement)}
    write_json(path, content, overwrite)


def read(cls: type[PlacementT], path: str | os.PathLike[str]) -> PlacementT:
    """Read a file that `write` wrote as a `cls`."""
    content = read_json(path, FORMAT, FORMAT_VERSION, "`plop place`")
    try:
        return cls(
            modules=tuple(content["modules"]),
            types=tuple(content["types"]),
            strategy=content["strategy"],
            label=content["label"],
            model=content["model"],
            lora_targets=_targets(content["lora_targets"]),
            fingerprints={name: _fingerprint(item) for name, item in content["fingerprints"].items()},
            notes=tuple(content["notes"]),
            r=_rank(content["r"]),
            ranks={name: _rank(rank) for name, rank in content["ranks"].items()},
            reason=content["reason"],
            evidence=None if content["evidence"] is None else Evidence.from_dict(content["evidence"]),
            left_out=_targets(content["left_out"]),
            unscored=tuple(map(str, content["unscored"])),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"`{path}` is a damaged placement; write it again with `plop place`") from error


def _fields(placement: PlacementData) -> dict[str, Any]:
    """Return the fields, ready for JSON; `dataclasses.asdict` would copy every name."""
    values = {field.name: getattr(placement, field.name) for field in dataclasses.fields(PlacementData)}
    for name in ("lora_targets", "left_out"):
        values[name] = [vars(target) for target in values[name]]
    values["fingerprints"] = {name: vars(item) for name, item in placement.fingerprints.items()}
    values["evidence"] = None if placement.evidence is None else vars(placement.evidence)
    return values


def _targets(items: Iterable[Mapping[str, Any]]) -> tuple[LoraTarget, ...]:
    return tuple(LoraTarget.from_dict(item) for item in items)


def _rank(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"no rank: {value!r}")
    return value


def _fingerprint(fields: Mapping[str, Any]) -> Fingerprint:
    fingerprint = Fingerprint(**fields)
    if not math.isfinite(fingerprint.norm):
        raise ValueError(f"no weight norm: {fingerprint.norm}")
    return fingerprint
