"""The journal of a scoring run: one line of totals per batch, from which a killed run continues."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from plop_ext.errors import InputError
from plop_ext.files import read_whole, resolve, writing
from plop_ext.forwards.rule import AUTO
from plop_ext.totals import Totals

FORMAT = "plop_ext.journal"
FORMAT_VERSION = 3
# Devices and kernels differ by rounding errors; checkpoints differ by far more.
_BASELINE_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Record:
    """One batch: the ids of its samples, a digest of its contents, and its totals.

    `unassigned` names the layers whose rows could not be assigned to samples for the first time in this batch, with
    the reason: the totals of these layers are incomplete from this batch on.
    """

    ids: tuple[int, ...]
    digest: str
    totals: Totals
    unassigned: Mapping[str, str] = field(default_factory=dict)


class Known:
    """The batches of a journal, which need no forward.

    Args:
        records: The batches.
        path: The journal, for errors.
    """

    def __init__(self, records: Sequence[Record], path: str | os.PathLike[str]) -> None:
        self._path = path
        self._of_sample = {sample: record for record in records for sample in record.ids}
        self._of_ids = {record.ids: record for record in records}

    def of_ids(self, ids: Sequence[int]) -> Record:
        """Return the batch with these samples."""
        return self._of_ids[tuple(ids)]

    def holds(self, record: Record) -> bool:
        """Return whether this very record is one of the journal."""
        return self._of_ids.get(record.ids) is record

    def find(self, ids: Sequence[int], digest: str) -> Record | None:
        """Return the record of a batch, or None if none of its samples was scored.

        Raises:
            InputError: If only some of the samples were scored, or the batch holds other inputs than the recorded one.
        """
        known = [sample for sample in ids if sample in self._of_sample]
        if not known:
            return None
        record = self._of_ids.get(tuple(ids)) or self._of_sample[known[0]]
        if record.ids != tuple(ids):
            raise InputError(
                f"sample {known[0]} in `{self._path}` was scored in another batch; resume with the same data, order "
                "and batch size"
            )
        if record.digest != digest:
            raise InputError(
                f"sample {known[0]} in `{self._path}` had other inputs; resume with the same data, in the same order"
            )
        return record


class Journal:
    """An append-only file of batches. Records are complete: an incomplete last line is dropped.

    The file is created with the first record. A record survives if the process is killed at any later moment, because
    it is passed to the operating system at once. It is not forced to the disk: after a crash of the machine the last
    records may be missing, and their batches are then scored again.

    Args:
        path: The file.
        run: Values that must be equal in the runs whose totals are added: model, modules, settings. Plain JSON.
        baseline: [M] baselines, which distinguish two checkpoints of one shape.
        resume: Continue an existing file. Without `resume`, an existing file is an error.

    Attributes:
        records: The batches of the existing file.
        known: The same, to find them in.

    Raises:
        InputError: If the file belongs to another run, is damaged, or exists and `resume` is false.
    """

    def __init__(
        self, path: str | os.PathLike[str], run: Mapping[str, Any], baseline: Sequence[float], resume: bool
    ) -> None:
        self._path = Path(path)
        self._baseline = list(baseline)
        self._header = {"format": FORMAT, "version": FORMAT_VERSION, "run": dict(run), "baseline": self._baseline}
        self._file: BinaryIO | None = None
        self.records: list[Record] = []
        with writing(path):
            resolve(path)  # refuses what is no path
            if self._path.exists():
                self._continue(resume)
        self.known = Known(self.records, self._path)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with writing(self._path):  # what a full disk refused before is tried again
                self._file.close()

    def append(self, record: Record) -> None:
        """Add a batch."""
        if self._file is None:
            with writing(self._path):
                self._file = self._path.open("xb")
            self._write_line(json.dumps(self._header).encode())
        self._write_line(encode(record))

    def delete(self) -> None:
        """Remove the file, once the result is saved."""
        self._path.unlink(missing_ok=True)

    def _continue(self, resume: bool) -> None:
        """Load the records of the existing file, and open it at their end."""
        if not resume:
            raise InputError(
                f"`{self._path}` belongs to an interrupted run; continue it with `resume` (plop score --resume), or "
                "delete it"
            )
        end = self._read()
        if end:
            self._file = self._path.open("r+b")
            self._file.truncate(end)
            self._file.seek(end)
        else:  # killed while the header was written
            self._path.unlink()

    def _write_line(self, line: bytes) -> None:
        assert self._file is not None
        with writing(self._path):
            self._file.write(line + b"\n")
            self._file.flush()

    def _read(self) -> int:
        """Load the complete records; return the offset at which they end, or 0 without a complete header."""
        data = read_whole(self._path)
        lines = data.split(b"\n")
        # Anything after the last line break is an incomplete line.
        whole, end = lines[:-1], len(data) - len(lines[-1])
        if not whole:
            return 0
        try:
            header = json.loads(whole[0])
            if header["format"] != FORMAT:
                raise ValueError
            if header["version"] != FORMAT_VERSION:
                raise InputError(
                    f"`{self._path}` was written by another version of plop_ext; delete it and score anew"
                )
            records = list(map(decode, whole[1:]))
            self._check(header)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"`{self._path}` is no journal of a scoring run, or damaged; delete it") from error
        self.records = records
        return end

    def _check(self, header: Mapping[str, Any]) -> None:
        found, wanted = header["run"], json.loads(json.dumps(self._header["run"]))
        for key in sorted(set(found) | set(wanted)):
            if found.get(key) != wanted.get(key):
                raise InputError(
                    f"`{self._path}` is of another run: its {key} is {_short(found.get(key))}, "
                    f"now it is {_short(wanted.get(key))}; resume with the same, or delete it"
                )
        if not np.allclose(header["baseline"], self._baseline, rtol=_BASELINE_TOLERANCE, atol=0, equal_nan=True):
            raise InputError(f"`{self._path}` is of another checkpoint: its weights differ; delete it and start anew")


def encode(record: Record) -> bytes:
    """Return a batch as one line of JSON."""
    data = record.totals.values.tobytes()
    content = {
        "ids": record.ids,
        "digest": record.digest,
        "shape": record.totals.values.shape,
        "crc": zlib.crc32(data),
        "totals": base64.b64encode(data).decode(),
        "unassigned": dict(record.unassigned),
    }
    return json.dumps(content).encode()


def decode(line: bytes) -> Record:
    """Return the batch that `encode` wrote; a damaged one raises a `KeyError`, `TypeError` or `ValueError`."""
    content = json.loads(line)
    data = base64.b64decode(content["totals"], validate=True)
    if zlib.crc32(data) != content["crc"]:
        raise ValueError
    totals = Totals(np.frombuffer(data, dtype=np.float64).reshape(content["shape"]))
    return Record(tuple(content["ids"]), content["digest"], totals, dict(content["unassigned"]))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def journalled_fast(path: str | os.PathLike[str] | None) -> bool | str:
    """Return whether the run of a journal uses fused kernels; `"auto"` if there is none that can be read."""
    try:
        with Path(path or "").open("rb") as file:
            found = json.loads(file.readline())["run"]["fast"]
    except (OSError, ValueError, KeyError, TypeError):  # which `Journal` reports
        return AUTO
    return found if isinstance(found, bool) else AUTO
