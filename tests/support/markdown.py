"""Reads the pages of the documentation."""

from __future__ import annotations

import re
from pathlib import Path


def python_blocks(text: str) -> list[str]:
    """The fenced Python examples of a Markdown text."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def table_of(path: Path, opening: str) -> list[list[str]]:
    """The rows of the table whose first line starts with `opening`, cell by cell, without its two head lines."""
    lines = path.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(opening))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows
