"""The result of an experiment: a row per candidate, the verdict, and their JSON form."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from plop_ext.arguments import check_choice
from plop_ext.errors import InputError
from plop_ext.experiment.intervals import Difference
from plop_ext.experiment.verdict import Verdict
from plop_ext.files import read_json, write_json

FORMAT = "plop_ext.comparison"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class ComparisonRow:
    """One candidate.

    Attributes:
        label: Name of the placement.
        why: Reason why it competes.
        strategy: How its modules were chosen.
        types: Module types that it adapts.
        modules: Number of modules that it adapts.
        r: Rank.
        params: Trainable parameters.
        memory_bytes: Memory that training adds, predicted for the longest rows; None if it is unknown.
        tuning: Triples of steps, learning rate and validation loss, NaN for a trial that diverged.
        learning_rate: The best rate on the validation rows; None if all diverged.
        lr_at_edge: Whether that rate is the lowest or highest that was tried: a better one may lie outside.
        validation_loss: The loss at that rate; NaN if all diverged.
        losses: Test loss for each seed, in nats per counted token; empty if it was not in the final. NaN for a trial
            whose loss was not finite.
        difference: Difference from the reference on the test rows, paired by row and seed; None for the reference,
            without a final and after a divergence.
        outcome: `"reference"`, `"better"`, `"no difference"`, `"worse"`, `"not decided"`, `"not in the final"` or
            `"diverged"`.
        seconds_per_step: Median over the final trials, or else over the tuning; not part of the comparison of results.
    """

    label: str
    why: str
    strategy: str
    types: tuple[str, ...]
    modules: int
    r: int
    params: int
    memory_bytes: int | None
    tuning: tuple[tuple[int, float, float], ...]
    learning_rate: float | None
    lr_at_edge: bool
    validation_loss: float
    losses: tuple[float, ...]
    difference: Difference | None
    outcome: str
    seconds_per_step: float = field(default=math.nan, compare=False)

    @property
    def loss_mean(self) -> float:
        """Mean test loss over the seeds; NaN without a final, or if one is NaN."""
        return statistics.fmean(self.losses) if self.losses else math.nan


@dataclass(frozen=True)
class Comparison:
    """Placements compared on held-out rows, at equal trainable parameters.

    Attributes:
        rows: One row per candidate, the reference first.
        verdict: What the experiment shows.
        reference: Label of the candidate that the others are compared with: all-linear, unless it diverged.
        loss_before: Test loss of the model without an adapter.
        max_params: Trainable parameters that each placement was allowed; None: those of the reference.
        mismatch: Largest relative difference in trainable parameters from the first row; ranks are whole numbers.
        schedule: The trials, as `plop_ext.experiment.schedule.Schedule.to_dict` gives them.
        settings: Steps, sizes, margin, rates and the numbers of rows.
        inputs: Model, hashes of weights and data, device and library versions.
        adapter: Folder of the winner's adapter, if one was kept; not part of the comparison of results.
        seconds: Time of all trials; not part of the comparison of results.
    """

    rows: tuple[ComparisonRow, ...]
    verdict: Verdict
    reference: str | None
    loss_before: float
    max_params: int | None
    mismatch: float
    schedule: dict[str, Any]
    settings: dict[str, Any]
    inputs: dict[str, Any]
    adapter: str | None = field(default=None, compare=False)
    seconds: float = field(default=math.nan, compare=False)

    def row(self, label: str) -> ComparisonRow:
        """Return the row of a candidate.

        Raises:
            InputError: If there is no such candidate.
        """
        check_choice([row.label for row in self.rows], label=label)
        return next(row for row in self.rows if row.label == label)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the final trials, in the order of `ComparisonRow.losses`."""
        return tuple(self.schedule["seeds"])

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON: numbers that are not finite become None.

        What depends on the clock is under `timing` alone: two runs with equal inputs agree in everything else.
        """
        content = asdict(self)
        steps = {row["label"]: row.pop("seconds_per_step") for row in content["rows"]}
        for row, given in zip(content["rows"], self.rows, strict=True):
            row["loss_mean"] = given.loss_mean
        timing = {"seconds": content.pop("seconds"), "seconds_per_step": steps}
        return _plain({"format": FORMAT, "version": FORMAT_VERSION, **content, "timing": timing})

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the comparison as JSON to `path`, atomically.

        Args:
            path: File to write. A symbolic link is followed; a device or a pipe is written to.
            overwrite: Replace any file. By default only an earlier file of the same kind is replaced.

        Raises:
            OutputError: If `path` cannot be written, or is a file of another kind and `overwrite` is false.
        """
        write_json(path, self.to_dict(), overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read a file that `save` wrote.

        Raises:
            InputError: If the file is missing, is no comparison, or has another version.
        """
        content = read_json(path, FORMAT, FORMAT_VERSION, "`plop compare` or `plop run`")
        try:
            timing = content["timing"]
            return cls(
                rows=tuple(_row(row, timing["seconds_per_step"]) for row in content["rows"]),
                verdict=Verdict(**content["verdict"]),
                loss_before=_number(content["loss_before"]),
                seconds=_number(timing["seconds"]),
                **{
                    name: content[name]
                    for name in ("reference", "max_params", "mismatch", "schedule", "settings", "inputs", "adapter")
                },
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"`{path}` is a damaged comparison; write it again with `plop compare`") from error


def _row(fields: Mapping[str, Any], seconds_per_step: Mapping[str, float | None]) -> ComparisonRow:
    found = {name: value for name, value in fields.items() if name != "loss_mean"}
    difference = found["difference"]
    return ComparisonRow(
        **{
            **found,
            "types": tuple(found["types"]),
            "tuning": tuple((steps, rate, _number(loss)) for steps, rate, loss in found["tuning"]),
            "validation_loss": _number(found["validation_loss"]),
            "losses": tuple(map(_number, found["losses"])),
            "difference": None
            if difference is None
            else Difference(**{name: _number(value) for name, value in difference.items()}),
        },
        seconds_per_step=_number(seconds_per_step[found["label"]]),
    )


def _plain(value: Any) -> Any:
    """Turn tuples into lists and numbers that are not finite into None, for JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _number(value: float | None) -> Any:
    """Return a number as it is, and NaN for None."""
    return math.nan if value is None else value
