"""Image files of scores and comparisons, drawn by matplotlib without a display and written atomically."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plop_ext.errors import InputError
from plop_ext.files import atomic_path
from plop_ext.report.figures import NAMES, style
from plop_ext.report.figures.differences import differences
from plop_ext.report.figures.heatmap import heatmap as heatmap_of
from plop_ext.report.quietly import without_glyph_warnings

if TYPE_CHECKING:
    from plop_ext.experiment.result import Comparison
    from plop_ext.report.figures import Drawing
    from plop_ext.scores import Scores

FORMATS = (".png", ".svg", ".pdf")
_SUFFIXES = (".png", ".svg")
# A figure is this many characters wide.
_TITLE_COLUMNS = 110


def heatmap(scores: Scores, path: str | os.PathLike[str], chosen: Collection[str] = ()) -> None:
    """Draw NFN as types x layers, types in order of their NFN.

    Args:
        scores: The scores to draw.
        path: File to write; .png, .svg or .pdf.
        chosen: Types to mark as chosen for LoRA.

    Raises:
        InputError: If the extension is unknown or the file cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context(style.settings()), without_glyph_warnings():
        figure = heatmap_of(scores, chosen, style.WIDE)
        data = scores.provenance["data"]
        title = f"{scores.provenance['model']['class']}, {data['samples']} samples"
        title += f" of {data['name']}" if data["name"] else ""
        title += " (green: LoRA)" if chosen else ""
        figure.suptitle(textwrap.fill(title, _TITLE_COLUMNS), fontsize=10, parse_math=False)
        save(figure, path)


def drawing_files() -> list[str]:
    """Return the names of all files that `save_drawings` may write."""
    return [f"{name}{suffix}" for name in NAMES for suffix in _SUFFIXES]


def save_drawings(drawings: Iterable[Drawing], folder: str | os.PathLike[str]) -> list[Path]:
    """Write each figure of a report as PNG and as SVG; returns the files."""
    import matplotlib

    paths = []
    with matplotlib.rc_context(style.settings()), without_glyph_warnings():
        for drawing in drawings:
            figure = drawing.draw(style.WIDE)
            for suffix in _SUFFIXES:
                paths.append(Path(folder) / f"{drawing.name}{suffix}")
                save(figure, paths[-1])
    return paths


def comparison_plot(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Draw the difference of each finalist from the reference, with its interval and the margin.

    Args:
        comparison: The comparison to draw.
        path: File to write; .png, .svg or .pdf.

    Raises:
        InputError: If the extension is unknown or the file cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context(style.settings()), without_glyph_warnings():
        save(differences(comparison, style.WIDE), path)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format of the path's extension."""
    suffix = picture_format(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=150)


def picture_format(path: str | os.PathLike[str]) -> str:
    """Return the format named by the path's extension, without a dot.

    Raises:
        InputError: If the extension is unknown.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"`{path}`: cannot draw a {suffix or 'file without extension'}; use {', '.join(FORMATS)}")
    return suffix.removeprefix(".")
