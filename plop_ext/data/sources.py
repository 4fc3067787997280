"""Rows of a local file, of a packaged data set, or of one on the hub."""

from __future__ import annotations

import csv
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from plop_ext import demo_assets
from plop_ext.arguments import check_whole
from plop_ext.demo_assets import arithmetic
from plop_ext.errors import InputError, SetupError, first_line
from plop_ext.hub import cached_when_offline

Row = dict[str, Any]

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
_ARITHMETIC_ROWS = {"test": 500, "train": 5000}
_PROSE_TEST_EVERY = 10


class Rows(list[Row]):
    """Rows of a data set, with their numbers in it.

    Attributes:
        numbers: Number of each row in the data set, from 0. A slice is a plain list without numbers.
    """

    def __init__(self, rows: Iterable[Row], numbers: Iterable[int] | None = None) -> None:
        super().__init__(rows)
        self.numbers = list(range(len(self)) if numbers is None else numbers)


def load_rows(source: str, *, split: str = "train", max_samples: int | None = None, seed: int = 0) -> Rows:
    """Load the rows of a data set.

    Files are read without `datasets`, so that an error can name the line and nothing is written to a cache.

    Args:
        source: One of

            - the path of a file: `.jsonl` (one JSON object per line), `.json` (an array of objects, or JSON lines),
              `.csv` (with a header line), `.parquet`, or `.txt` (UTF-8; one row per line that is not blank, under the
              key `text`; lines are never joined, so reflow hard-wrapped prose to one paragraph per line first);
            - `"arithmetic"` (keys `prompt` and `completion`) or `"prose"` (key `text`), which ship with the package;
            - a data set on the hub, `owner/name` or `owner/name:configuration`.
        split: Split of a hub or packaged data set. The packaged ones have `"train"` and `"test"`, which share no row.
            Ignored for a file, which has no splits.
        max_samples: Keep a random subset of this many rows, in their original order. Default all.
        seed: Seed of that subset.

    Returns:
        The rows as dicts, at least one, with their numbers in the whole data set.

    Raises:
        InputError: If the source cannot be found or read, or holds no row.
        SetupError: If the source is on the hub and the hub cannot be reached.

    Example:
        >>> from plop_ext.data import load_rows
        >>> sorted(load_rows("arithmetic", max_samples=1)[0])
        ['completion', 'prompt']
    """
    check_whole(max_samples=max_samples)
    path = Path(source).expanduser()
    if source in demo_assets.DATASETS:
        rows = _packaged_rows(source, split, max_samples)
    elif path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise InputError(
                f"`source` {source} has an unknown extension {path.suffix!r}; give one of {', '.join(_READERS)}"
            )
        rows = _read_file(reader, path)
    elif path.is_dir() and source:
        raise InputError(f"`source` {source} is a folder; name a file in it ({', '.join(_READERS)})")
    elif path.suffix.lower() in _READERS or not _HUB_NAME.fullmatch(source):
        raise InputError(f"`source` {source!r}: no such file; check the path")
    else:
        rows = _hub_rows(source, split)
    if not rows:
        raise InputError(f"`source` {source} holds no rows; give a data set with at least one")
    if max_samples is not None and max_samples < len(rows):
        chosen = sorted(random.Random(seed).sample(range(len(rows)), max_samples))
        return Rows((rows[index] for index in chosen), chosen)
    return Rows(rows)


def _read_file(reader: Callable[[Path], list[Row]], path: Path) -> list[Row]:
    """Read a file; if that fails, name it in the error."""
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise InputError(f"`source` {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"`source` {path} cannot be read: {error.strerror or error}; check the file") from error


def _read_jsonl(path: Path) -> list[Row]:
    """Read one JSON object per line; blank lines are skipped."""
    return list(_parse_lines(path, path.read_text(encoding="utf-8-sig").split("\n")))


def _parse_lines(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """Yield the object on each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"`source` {path}, line {number}: not JSON ({error}); put one object on each line"
                ) from error
            yield _checked(row, f"{path}, line {number}")


def _read_json(path: Path) -> list[Row]:
    """Read an array of objects, or JSON lines, which often carry this extension."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return list(_parse_lines(path, text.split("\n")))
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"`source` {path}, line {error.lineno}: not JSON ({error.msg}); give an array of objects"
        ) from error
    return [_checked(row, f"{path}, item {number}") for number, row in enumerate(rows, start=1)]


def _checked(row: object, where: str) -> Row:
    """Return `row` if it is a JSON object."""
    if not isinstance(row, dict):
        raise InputError(f"`source` {where}: a row must be a JSON object, got {type(row).__name__}")
    return row


def _read_csv(path: Path) -> list[Row]:
    """Read comma-separated values under a header line; every value is a string."""
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return list(_parse_csv(path, csv.DictReader(stream, strict=True)))
    finally:
        csv.field_size_limit(limit)


def _parse_csv(path: Path, reader: csv.DictReader[str]) -> Iterator[Row]:
    """Yield the records, all of which must have as many fields as the header."""
    try:
        for row in reader:
            # DictReader files surplus fields under None and fills missing ones with None.
            if None in row or None in row.values():
                raise InputError(
                    f"`source` {path}, line {reader.line_num}: {'more' if None in row else 'fewer'} fields than the"
                    f" {len(reader.fieldnames or ())} of the header; quote values that hold commas or line breaks"
                )
            yield row
    except csv.Error as error:
        raise InputError(
            f"`source` {path}, line {reader.reader.line_num}: not CSV ({error}); quote values that hold quotes"
        ) from error


def _read_parquet(path: Path) -> list[Row]:
    """Read a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        # Through an open file: given a path, pyarrow would take parent folders named a=b for columns.
        with path.open("rb") as stream:
            return pyarrow.parquet.read_table(stream).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(
            f"`source` {path} is not a readable parquet file ({first_line(error)}); write or download it again"
        ) from error


def _read_text(path: Path) -> list[Row]:
    """Read one row per line that is not blank."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [{"text": line} for line in lines if line.strip()]


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _packaged_rows(name: str, split: str, max_samples: int | None) -> list[Row]:
    """Return a split of a packaged data set; the test split does not depend on `max_samples`."""
    if split not in ("train", "test"):
        raise InputError(f"`split` {split!r}: the packaged data set {name} has train and test")
    if name == "arithmetic":
        held_out = _ARITHMETIC_ROWS["test"]
        wanted = max(max_samples or 0, _ARITHMETIC_ROWS["train"]) if split == "train" else 0
        pool = arithmetic.generate(held_out + wanted)
        return list(pool[:held_out] if split == "test" else pool[held_out:])
    pool = demo_assets.rows(name, sys.maxsize)
    return [row for index, row in enumerate(pool) if (index % _PROSE_TEST_EVERY == 0) == (split == "test")]


def _hub_rows(source: str, split: str) -> list[Row]:
    """Download a split from the hub, or read it from the local cache."""
    import datasets

    name, _, configuration = source.partition(":")
    online = True
    progress = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with cached_when_offline() as online:
            return datasets.load_dataset(name, configuration or None, split=split).to_list()
    except Exception as error:
        if not online or isinstance(error, ConnectionError):
            raise SetupError(
                f"`source` {source!r} is no local file, and the hub cannot be reached; give the path of a file"
                f" ({', '.join(_READERS)}) or one of {', '.join(demo_assets.DATASETS)}"
            ) from error
        raise InputError(
            f"`source` {source!r} cannot be loaded from the hub with split {split!r}: {first_line(error)};"
            " check the name, `owner/name:configuration` and the split"
        ) from error
    finally:
        if not progress:
            datasets.enable_progress_bars()
