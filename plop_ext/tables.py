"""Tables for notebooks: HTML in the reader's own colours, and data frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from plop_ext.errors import SetupError

if TYPE_CHECKING:
    from pandas import DataFrame

_CELL = "padding:2px 8px;text-align:"


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], shades: Sequence[Sequence[float]] | None = None
) -> str:
    """Return an HTML table whose first column is text and whose others are numbers.

    Args:
        header: Titles of the columns.
        rows: Texts of the cells.
        shades: Opacity of the background of each cell after the first one, from 0 to 1, by row.
    """
    lines = [_row("th", header, ())]
    for number, row in enumerate(rows):
        lines.append(_row("td", row, () if shades is None else shades[number]))
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[str], shades: Sequence[float]) -> str:
    text = ""
    for column, cell in enumerate(cells):
        style = _CELL + ("left" if column == 0 else "right")
        if shades and column > 0 and shades[column - 1] > 0:
            style += f";background:rgba(230,120,20,{shades[column - 1]:.2f})"
        text += f'<{tag} style="{style}">{escape(cell)}</{tag}>'
    return f"<tr>{text}</tr>"


def data_frame(rows: Sequence[Mapping[str, Any]]) -> DataFrame:
    """Return a pandas data frame with one row for each mapping.

    Raises:
        SetupError: If pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise SetupError("`to_pandas` needs pandas: pip install pandas") from error
    return pandas.DataFrame(rows)
