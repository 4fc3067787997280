"""What notebooks show of a placement."""

from __future__ import annotations

from html import escape
from typing import Any

from plop_ext.placement.data import PlacementData
from plop_ext.tables import html_table

_MOST_ROWS = 30


def rows(placement: PlacementData) -> list[dict[str, Any]]:
    """Return name, kind, rank and number of LoRA parameters of each target."""
    ranks = placement.ranks_at()
    return [
        {
            "target": target.name,
            "parameter": target.parameter,
            "rank": ranks[target.name],
            "lora_parameters": ranks[target.name] * target.size,
        }
        for target in placement.lora_targets
    ]


def html(placement: PlacementData) -> str:
    """Return the placement in a line, its notes, and its first targets in a table."""
    found = rows(placement)
    total = sum(row["lora_parameters"] for row in found)
    cells = [[row["target"], str(row["rank"]), f"{row['lora_parameters']:,}"] for row in found[:_MOST_ROWS]]
    more = len(found) - len(cells)
    if more > 0:
        cells.append([f"and {more:,} more", "", ""])
    notes = "".join(f"<br>{escape(note)}" for note in placement.notes)
    return (
        f"<b>{escape(placement.label)}</b> of {escape(placement.model)}: {escape(', '.join(placement.types))}; "
        f"{total:,} parameters in {len(found):,} targets{notes}<details><summary>targets</summary>"
        f"{html_table(['target', 'rank', 'LoRA parameters'], cells)}</details>"
    )
