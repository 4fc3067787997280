"""What an experiment will take, said before its first trial."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from plop_ext.errors import InputError
from plop_ext.experiment.schedule import Schedule, Speed
from plop_ext.progress import span

# Journal, scores, result and report.
_OTHER_FILES = 8 * 2**20


@dataclass(frozen=True)
class Estimate:
    """Time, memory and disk of an experiment.

    Attributes:
        schedule: The trials.
        candidates: Number of candidates.
        seconds: Predicted time, from steps that were timed.
        step_seconds: Fastest and slowest candidate's time of a step.
        peak_bytes: Measured peak memory with the longest rows; 0 if unknown.
        on_cuda: Whether that is the memory of a CUDA device; otherwise it is that of the process.
        disk_bytes: Size of the files, most of which are adapters; 0 if none are kept.
        free_bytes: Free space where they are written; 0 if none are kept.
    """

    schedule: Schedule
    candidates: int
    seconds: float
    step_seconds: tuple[float, float]
    peak_bytes: int
    on_cuda: bool
    disk_bytes: int
    free_bytes: int

    def lines(self) -> list[str]:
        """Return the estimate in words."""
        low, high = (span(value) for value in self.step_seconds)
        step = low if low == high else f"{low} to {high}"
        at_most = "at most " if self.schedule.widen else ""
        lines = [self.schedule.describe(self.candidates)]
        lines.append(f"time: {at_most}about {span(self.seconds)} ({step} a step, measured)")
        if self.peak_bytes:
            where = "of the device" if self.on_cuda else "of the process"
            lines.append(f"memory: {_size(self.peak_bytes)} {where} at its peak, measured on the longest rows")
        if self.disk_bytes:
            lines.append(f"disk: at most {_size(self.disk_bytes)}, of {_size(self.free_bytes)} free")
        return lines


def estimate(
    schedule: Schedule, speed: Speed, peak_bytes: int, on_cuda: bool, adapter_bytes: int, folder: Path | None
) -> Estimate:
    """Predict what a schedule takes.

    Args:
        schedule: The trials.
        speed: Measured times.
        peak_bytes: Measured peak memory.
        on_cuda: Whether it is that of a CUDA device.
        adapter_bytes: Size of the largest adapter.
        folder: Where adapters are kept; None keeps none. It need not exist.

    Raises:
        InputError: If the files do not fit on the disk.
    """
    disk, free = 0, 0
    if folder is not None:
        disk = schedule.finalists * adapter_bytes + _OTHER_FILES
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if disk > free:
            raise InputError(f"`{folder}` needs {_size(disk)}, and {_size(free)} are free; free some, or name another")
    return Estimate(
        schedule,
        len(speed.step),
        speed.seconds(schedule),
        (min(speed.step.values()), max(speed.step.values())),
        peak_bytes,
        on_cuda,
        disk,
        free,
    )


def _size(count: int) -> str:
    """Return a size such as `14 MiB`."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}" if count < 10 * unit else f"{count / unit:.0f} {name}"
    return f"{count / 2**10:.0f} KiB"
