"""docs/data.md lists every kind of file, compression and format, and every column that is read."""

from __future__ import annotations

import re

from plop_ext.data.formats import COLUMNS, FORMATS
from plop_ext.data.readers import _COMPRESSIONS, READERS
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
NAMES = set(re.findall(r"`([\w.]+)`", TEXT))


def test_every_extension_and_column_is_listed() -> None:
    assert NAMES >= READERS.keys() | _COMPRESSIONS.keys()
    assert NAMES >= COLUMNS


def test_formats_are_listed_in_the_order_in_which_they_are_tried() -> None:
    section = TEXT.split("## Formats\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    found = [tuple(re.findall(r"`(\w+)`", line.split("; perhaps")[0].split(" | ")[0])) for line in lines]
    assert found == [known.columns for known in FORMATS]
