"""What predicts the order of the placements, from the result files."""

from __future__ import annotations

from pathlib import Path


def main(results: Path) -> None:
    """Not written yet."""
    raise NotImplementedError
