"""Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: first column left, the others right."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(row: Mapping[str, Any], name: str, digits: int = 3) -> str:
    """Return the median and the 20th to 80th percentile of a field; one figure if it is large, nothing if missing."""
    if name not in row:
        return ""
    if row[name] >= 3:
        return f"{row[name]:.1f}"
    low, high = row[f"{name}_p20"], row[f"{name}_p80"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
