"""Rows of one local file.

The text formats are read here and not by `datasets`, whose builders name no line in an error, read empty fields and
words such as "NA" as missing, and write a copy of the file to a cache.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from plop_ext.data.formats import COLUMNS
from plop_ext.data.rows import Place, Row, Rows
from plop_ext.errors import InputError, first_line

_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
_DELIMITERS = ",;\t|"

Located = Iterator[tuple[Place, Row]]


def extension(path: Path) -> str:
    """Return the extension that names the format of a file, in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    else:
        suffixes = suffixes[-1:]
    return suffixes[-1] if suffixes else ""


def read(path: Path) -> Rows:
    """Read the rows of a file.

    Raises:
        InputError: If the format is unknown, or the file cannot be read.
    """
    reader = READERS.get(extension(path))
    if reader is None:
        raise InputError(
            f"`source` {path} has an unknown extension {path.suffix!r}; give one of {', '.join(READERS)}, or one of"
            f" them compressed ({', '.join(_COMPRESSIONS)})"
        )
    try:
        found = list(reader(path))
    except OSError as error:
        raise InputError(
            f"`source` {path} cannot be read: {error.strerror or first_line(error)}; check the file"
        ) from error
    return Rows((row for _, row in found), [place for place, _ in found])


def _open(path: Path) -> Any:
    """Open a file, decompressed, for reading bytes."""
    compression = _COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    import pyarrow

    return pyarrow.input_stream(str(path), compression=compression)


def _text(path: Path) -> str:
    """Read a text file."""
    with _open(path) as stream:
        content = stream.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"`source` {path}, line {line}: not UTF-8 text (byte {error.start} of the file); convert the file to UTF-8"
        ) from error


def _lines(path: Path, text: str) -> Iterator[tuple[Place, str]]:
    """Yield the lines that are not blank."""
    # `str.splitlines` would also split at characters such as U+2028, which texts may hold.
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if line.strip():
            yield Place(str(path), "line", number), line


def _read_jsonl(path: Path) -> Located:
    """Yield the JSON object on each line."""
    return _parse_lines(_lines(path, _text(path)))


def _parse_lines(lines: Iterable[tuple[Place, str]]) -> Located:
    """Yield the JSON object on each of the lines."""
    for place, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            _refuse(place, "JSON", error, "put one object on each line")
        yield place, _object(place, row)


def _read_json(path: Path) -> Located:
    """Yield the objects of an array, of an object that holds one, or of JSON lines, which may be so named."""
    text = _text(path)
    lines = list(_lines(path, text))
    if len(lines) > 1 and not text.lstrip().startswith("[") and _is_json(lines[0][1]):
        return _parse_lines(lines)
    try:
        content = json.loads(text) if lines else []
    except json.JSONDecodeError as error:
        _refuse(Place(str(path), "line", error.lineno), "JSON", error.msg, "give an array of objects")
    except (ValueError, RecursionError) as error:
        _refuse(Place(str(path), "line", 1), "JSON", error, "give an array of objects")
    items = _items(path, content) if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise InputError(f"`source` {path} holds a JSON {type(items).__name__}; give an array of objects")
    places = (Place(str(path), "item", number) for number in range(1, len(items) + 1))
    return ((place, _object(place, item)) for place, item in zip(places, items, strict=True))


def _items(path: Path, content: Row) -> list[Any]:
    """Return the rows in a JSON object: those of its only list of objects, such as `data`, or the object itself."""
    lists = {
        key: value
        for key, value in content.items()
        if isinstance(value, list) and all(isinstance(item, dict) for item in value)
    }
    if COLUMNS & content.keys() or not lists:
        return [content]
    if len(lists) > 1:
        keys = ", ".join(f"`{key}`" for key in lists)
        raise InputError(
            f"`source` {path} is an object with several lists of objects ({keys}); give the array of one of them"
        )
    return next(iter(lists.values()))


def _is_json(text: str) -> bool:
    """Return whether a text is JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _object(place: Place, row: object) -> Row:
    """Return `row` if it is a JSON object."""
    if not isinstance(row, dict):
        raise InputError(f"`source` {place}: a row must be a JSON object, got {type(row).__name__}")
    return row


def _refuse(place: Place, kind: str, reason: object, fix: str) -> NoReturn:
    """Raise `InputError` for content that is not of the kind that the extension promises."""
    why = first_line(reason) if isinstance(reason, BaseException) else reason
    raise InputError(f"`source` {place}: not {kind} ({why}); {fix}") from None


def _read_csv(path: Path) -> Located:
    """Yield the records under a header line, whose delimiter is the most frequent in it; every value is a string."""
    text = _text(path)
    header = text.lstrip("\r\n").partition("\n")[0]
    return _parse_csv(path, text, max(_DELIMITERS, key=header.count))


def _read_tsv(path: Path) -> Located:
    """Yield the tab-separated records under a header line."""
    return _parse_csv(path, _text(path), "\t")


def _parse_csv(path: Path, text: str, delimiter: str) -> Located:
    """Yield the records, all of which must have as many fields as the header."""
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    # Split at newlines only, and not by `str.splitlines`: quoted fields may hold any character.
    reader = csv.reader((line + "\n" for line in text.split("\n")), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            place, line = Place(str(path), "line", line), reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = fields
                continue
            if len(fields) != len(header):
                raise InputError(
                    f"`source` {place}: {'more' if len(fields) > len(header) else 'fewer'} fields than the"
                    f" {len(header)} of the header; quote values that hold {delimiter!r} or line breaks"
                )
            yield place, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        _refuse(Place(str(path), "line", line), "CSV", error, "quote values that hold quotes")
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Located:
    """Yield the rows of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        # Through an open file: given a path, pyarrow would take parent folders named a=b for columns.
        with _open(path) as stream:
            rows = pyarrow.parquet.read_table(stream).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(
            f"`source` {path} is not a readable parquet file ({first_line(error)}); write or download it again"
        ) from error
    return _numbered(path, rows)


def _read_arrow(path: Path) -> Located:
    """Yield the rows of an Arrow stream or file, as `datasets` writes them."""
    import datasets
    import pyarrow

    try:
        rows = datasets.Dataset.from_file(str(path)).to_list()
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(
            f"`source` {path} is not a readable Arrow file ({first_line(error)}); write or download it again"
        ) from error
    return _numbered(path, rows)


def _numbered(path: Path, rows: list[Row]) -> Located:
    """Yield rows of a format without lines."""
    return ((Place(str(path), "row", number), row) for number, row in enumerate(rows, start=1))


def _read_text(path: Path) -> Located:
    """Yield each line as a row of its own."""
    return ((place, {"text": line}) for place, line in _lines(path, _text(path)))


READERS: dict[str, Callable[[Path], Located]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
"""Reader of each format, by extension."""
