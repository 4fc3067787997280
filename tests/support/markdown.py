"""Reads the pages of the documentation."""

from __future__ import annotations

import re


def python_blocks(text: str) -> list[str]:
    """The fenced Python examples of a Markdown text."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
