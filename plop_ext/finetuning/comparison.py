"""The result of comparing placements: rows, the figures derived from them, and their JSON form."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from plop_ext.errors import InputError
from plop_ext.files import read_json, write_json
from plop_ext.finetuning.finetune import finite_or_none

FORMAT = "plop_ext.comparison"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ComparisonRow:
    """One placement in a comparison.

    Attributes:
        label: Name of the placement.
        strategy: How its modules were chosen.
        types: Module types that it adapts.
        modules: Number of modules that it adapts.
        r: Rank, the largest that fits the allowed parameters.
        params: Trainable parameters at that rank.
        learning_rate: The best rate of the grid on the validation part.
        lr_at_edge: Whether that rate is the lowest or highest of the grid: a better rate may lie outside the grid.
        tuning: Pairs of a learning rate and its validation loss, NaN for a run that diverged.
        losses: Held-out loss for each seed, in nats per counted token, NaN if it was not finite.
        differences: `losses` minus those of the all-linear row with the same seed. Runs of one seed share the order of
            the samples, so differences scatter less than losses.
        seconds_per_step: Median over the seeds.
        diverged: Number of seeds whose run diverged.
    """

    label: str
    strategy: str
    types: tuple[str, ...]
    modules: int
    r: int
    params: int
    learning_rate: float
    lr_at_edge: bool
    tuning: tuple[tuple[float, float], ...]
    losses: tuple[float, ...]
    differences: tuple[float, ...]
    seconds_per_step: float
    diverged: int

    @property
    def loss_mean(self) -> float:
        """Mean held-out loss over the seeds; NaN if one is NaN, because the mean of the others would be too low."""
        return statistics.fmean(self.losses)

    @property
    def loss_std(self) -> float:
        """Sample standard deviation over the seeds; NaN for one seed."""
        return _std(self.losses)

    @property
    def difference_mean(self) -> float:
        """Mean difference from the all-linear row; negative is better."""
        return statistics.fmean(self.differences)

    @property
    def difference_std(self) -> float:
        """Sample standard deviation of the difference over the seeds; NaN for one seed."""
        return _std(self.differences)


@dataclass(frozen=True)
class Comparison:
    """Placements compared at equal trainable parameters.

    Attributes:
        rows: One row per placement, in the order given; the all-linear row is last if it was added.
        loss_before: Held-out loss of the model without an adapter.
        max_params: Trainable parameters that each placement was allowed.
        seeds: Seeds of the runs, in the order of `ComparisonRow.losses`.
        learning_rates: The grid, ascending.
        settings: Steps, sizes, model, device and library versions.
    """

    rows: tuple[ComparisonRow, ...]
    loss_before: float
    max_params: int
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> ComparisonRow:
        """The all-linear row, which has the most modules, because every other placement adapts a subset of them."""
        return max(self.rows, key=lambda row: row.modules)

    @property
    def mismatch(self) -> float:
        """Largest relative difference in trainable parameters between two placements; ranks are whole numbers."""
        counts = [row.params for row in self.rows]
        return (max(counts) - min(counts)) / max(counts)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and derived figures, ready for JSON: numbers that are not finite become None."""
        derived = ("loss_mean", "loss_std", "difference_mean", "difference_std")
        rows = [vars(row) | {name: getattr(row, name) for name in derived} for row in self.rows]
        return _plain(
            {"format": FORMAT, "version": FORMAT_VERSION, "mismatch": self.mismatch, **vars(self), "rows": rows}
        )

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the comparison as JSON to `path` atomically.

        Args:
            path: File to write. A symbolic link is followed; a device or a pipe is written to.
            overwrite: Replace any file. By default only an earlier file of the same kind is replaced.

        Raises:
            InputError: If `path` cannot be written, or is a file of another kind and `overwrite` is false.
        """
        write_json(path, self.to_dict(), overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read a file that `save` wrote.

        Raises:
            InputError: If the file is missing, is no comparison, or has another version.
        """
        content = read_json(path, FORMAT, FORMAT_VERSION, "`plop compare`")
        try:
            rows = tuple(
                ComparisonRow(
                    label=row["label"],
                    strategy=row["strategy"],
                    types=tuple(row["types"]),
                    modules=int(row["modules"]),
                    r=int(row["r"]),
                    params=int(row["params"]),
                    learning_rate=float(row["learning_rate"]),
                    lr_at_edge=bool(row["lr_at_edge"]),
                    tuning=tuple((float(rate), _number(loss)) for rate, loss in row["tuning"]),
                    losses=tuple(map(_number, row["losses"])),
                    differences=tuple(map(_number, row["differences"])),
                    seconds_per_step=_number(row["seconds_per_step"]),
                    diverged=int(row["diverged"]),
                )
                for row in content["rows"]
            )
            return cls(
                rows=rows,
                loss_before=_number(content["loss_before"]),
                max_params=int(content["max_params"]),
                seeds=tuple(map(int, content["seeds"])),
                learning_rates=tuple(map(float, content["learning_rates"])),
                settings=dict(content["settings"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"`{path}` is a damaged comparison; write it again with `plop compare`") from error


def _std(values: Sequence[float]) -> float:
    """Return the sample standard deviation; NaN for one value, or if one is not finite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def _plain(value: Any) -> Any:
    """Turn tuples into lists and numbers that are not finite into None, for JSON."""
    if isinstance(value, float):
        return finite_or_none(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _number(value: float | None) -> float:
    """Read a number; None stands for NaN."""
    return math.nan if value is None else float(value)
