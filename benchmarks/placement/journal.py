"""What has been done: one JSON object a line, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Journal:
    """Records of finished work in a file that only grows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, records: Iterable[Record]) -> None:
        """Write `records` so that they outlast this process."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the end of a line that was not written whole
                    file.write(b"\n")
            file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self, kind: str, **fields: Any) -> list[Record]:
        """The records of `kind` with these `fields`, oldest first; lines that were not written whole are left out."""
        if not self.path.exists():
            return []
        wanted = {"kind": kind, **fields}
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if all(record.get(name) == value for name, value in wanted.items()):
                found.append(record)
        return found


class Deadline:
    """The time that a stage may take."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def allows(self, seconds: float) -> bool:
        """Whether work of so many `seconds` would end in time."""
        return self._end is None or time.monotonic() + seconds <= self._end
