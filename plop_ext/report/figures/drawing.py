"""A figure with the words that belong to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure of a report, drawn when it is asked for.

    Attributes:
        name: Its name, which is also the name of its files.
        title: What it shows, in a few words.
        caption: How to read it.
        description: What it says, for a reader who cannot see it.
        draw: Draws it, for a width in inches (`style.WIDE` or `style.NARROW`).
    """

    name: str
    title: str
    caption: str
    description: str
    draw: Callable[[float], Figure]
