"""The NFN of each type over the steps of a training."""

from __future__ import annotations

from typing import Any

# A longer training keeps every second record, then every fourth, and so on.
MOST_RECORDS = 1000


class Drift:
    """Records of NFN by type, evenly spread over the training, in bounded memory."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._stride = 1
        self._seen = 0

    def add(self, step: int, nfn: dict[str, float]) -> None:
        """Add the NFN of each type up to optimizer step `step`."""
        if self._seen % self._stride == 0:
            self._records.append({"step": step, "nfn": nfn})
        self._seen += 1
        if len(self._records) > MOST_RECORDS:
            self._records = self._records[::2]
            self._stride *= 2

    @property
    def records(self) -> list[dict[str, Any]]:
        """`step` and `nfn` by type of each record, in the order of the steps."""
        return list(self._records)
