"""The journal of an experiment: inputs, plan, then a line per trial, from which a killed run continues."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from plop_ext.errors import InputError
from plop_ext.experiment.race import Outcome, Trial
from plop_ext.files import resolve, writing

FORMAT = "plop_ext.trials"
FORMAT_VERSION = 1


class TrialJournal:
    """An append-only file of whole lines, each forced to the disk before the next trial begins.

    A process killed at any moment leaves at most an incomplete last line, which is dropped. A second process on the
    same file is refused, because two would interleave their lines.

    Args:
        path: The file; None keeps the journal in memory.
        inputs: Hashes and settings that must be equal in a run that continues. Plain JSON.
        resume: Continue an existing file. Without `resume`, an existing file is an error.

    Raises:
        InputError: If the file is in use, of another run, damaged, or exists and `resume` is false.
    """

    def __init__(self, path: str | os.PathLike[str] | None, inputs: Mapping[str, Any], resume: bool) -> None:
        self._path = None
        if path is not None:
            with writing(path):
                self._path = resolve(path)
        self._file: BinaryIO | None = None
        self._outcomes: dict[Trial, Outcome] = {}
        self.plan: dict[str, Any] | None = None
        if self._path is None:
            return
        if self._path.exists() and not resume:
            raise InputError(f"`{path}` belongs to an earlier run; continue it with `resume`, or delete it")
        self._file = self._open()
        end = self._read(json.loads(json.dumps(inputs)))
        if end < self._file.tell():  # an incomplete last line
            self._file.truncate(end)
            self._file.seek(end)
        if not end:
            self._write({"format": FORMAT, "version": FORMAT_VERSION, "inputs": dict(inputs)})
            _sync_folder(self._path.parent)

    def __enter__(self) -> TrialJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        """Return the number of finished trials."""
        return len(self._outcomes)

    def start(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Write and return what is fixed before the first trial: the schedule, and the losses without an adapter."""
        started: dict[str, Any] = json.loads(json.dumps(plan))
        self.plan = started
        self._write({"plan": started})
        return started

    def find(self, trial: Trial) -> Outcome | None:
        """Return the outcome of a finished trial, or None."""
        return self._outcomes.get(trial)

    def add(self, trial: Trial, outcome: Outcome) -> None:
        """Add a finished trial."""
        self._outcomes[trial] = outcome
        loss = outcome.loss if math.isfinite(outcome.loss) else None
        nats = [value if math.isfinite(value) else None for value in outcome.nats]
        self._write({"trial": trial.to_dict(), "outcome": {**vars(outcome), "loss": loss, "nats": nats}})

    def _open(self) -> BinaryIO:
        assert self._path is not None
        try:
            file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except OSError as error:
            raise InputError(f"cannot write `{self._path}`: {error.strerror}; name a writable folder") from error
        try:
            import fcntl
        except ImportError:  # Windows
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise InputError(f"`{self._path}` is in use by another process; wait for it, or stop it") from error
        return file

    def _write(self, content: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(content, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, inputs: Mapping[str, Any]) -> int:
        """Load the whole lines; return the offset at which they end, or 0 without a whole first line."""
        assert self._file is not None
        data = self._file.read()
        lines = data.split(b"\n")
        whole, end = lines[:-1], len(data) - len(lines[-1])
        try:
            records = [json.loads(line) for line in whole]
            if not records:
                return 0
            if (records[0]["format"], records[0]["version"]) != (FORMAT, FORMAT_VERSION):
                raise ValueError
            self._check(records[0]["inputs"], inputs)
            if len(records) > 1:
                self.plan = records[1]["plan"]
            for record in records[2:]:
                self._outcomes[Trial(**record["trial"])] = _outcome(record["outcome"])
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"`{self._path}` is no journal of trials, or damaged; delete it") from error
        return end

    def _check(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for what, before, now in _differences(found, wanted):
            raise InputError(
                f"`{self._path}` is of another run: its {what} is {_short(before)}, now it is {_short(now)}; resume"
                " with the same, or use another folder"
            )


def recorded(journal: TrialJournal, run: Callable[[Trial], Outcome]) -> Callable[[Trial], Outcome]:
    """Return a function that takes outcomes from the journal, and runs and records the trials it lacks."""

    def ask(trial: Trial) -> Outcome:
        outcome = journal.find(trial)
        if outcome is None:
            outcome = run(trial)
            journal.add(trial, outcome)
        return outcome

    return ask


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the entries that differ: their name, and both values."""
    for key in [*wanted, *(key for key in found if key not in wanted)]:
        before, now = found.get(key), wanted.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from ((f"{key}: {what}", *values) for what, *values in _differences(before, now))
        elif before != now:
            yield key, before, now


def _outcome(fields: Mapping[str, Any]) -> Outcome:
    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    return Outcome(**{**fields, "loss": number(fields["loss"]), "nats": tuple(map(number, fields["nats"]))})


def _sync_folder(folder: Path) -> None:
    """Force the entry of a new file to the disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
