"""Rows of a local folder: the shards of a data set, or what `Dataset.save_to_disk` wrote."""

from __future__ import annotations

import glob
import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from plop_ext.data import readers
from plop_ext.data.rows import Rows
from plop_ext.errors import InputError, first_line

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")


def read(folder: Path, split: str) -> Rows:
    """Read the rows of one split of the data set in a folder.

    Raises:
        InputError: If the folder holds no data set, no such split, or a file that cannot be read.
    """
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            return _saved(folder, split)
        paths = _shards(folder, split)
    except OSError as error:
        raise InputError(
            f"`source` {folder} cannot be read: {error.strerror or first_line(error)}; check the folder"
        ) from error
    parts = [readers.read(path) for path in paths]
    return Rows((row for part in parts for row in part), [place for part in parts for place in part.places])


def _shards(folder: Path, split: str) -> list[Path]:
    """Return the files of a split, which `datasets` recognizes by their names and folders."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    root = glob.escape(str(folder.absolute()))
    known = list(readers.READERS)
    try:
        files = DataFilesDict.from_patterns(get_data_patterns(root), base_path=root, allowed_extensions=known)
    except (EmptyDatasetError, FileNotFoundError) as error:
        raise InputError(f"`source` {folder} is a folder without data files; put {', '.join(known)} in it") from error
    if split not in files:
        raise InputError(f"`split` {split!r}: the folder {folder} has {', '.join(map(str, files))}")
    paths = sorted(Path(str(name)) for name in files[split])
    counts = Counter(readers.extension(path) for path in paths if readers.extension(path) in readers.READERS)
    if not counts:
        raise InputError(f"`source` {folder} has no data files in split {split!r}; put {', '.join(known)} in it")
    chosen = max(counts, key=counts.__getitem__)
    others = [path.name for path in paths if readers.extension(path) != chosen]
    if others:
        logger.warning("`source` %s: reading the %s files, and not %s", folder, chosen, ", ".join(others))
    paths = [path for path in paths if readers.extension(path) == chosen]
    _warn_of_missing(folder, paths)
    return paths


def _warn_of_missing(folder: Path, paths: Iterable[Path]) -> None:
    """Warn if the names of the shards promise more of them."""
    found: Counter[tuple[str, int]] = Counter()
    for path in paths:
        if match := _SHARD.match(path.name):
            found[match[1], int(match[3])] += 1
    for (name, total), count in found.items():
        if count < total:
            logger.warning("`source` %s holds %d of the %d shards of %s; reading these", folder, count, total, name)


def _saved(folder: Path, split: str) -> Rows:
    """Read what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise InputError(f"`split` {split!r}: the folder {folder} has {', '.join(data)}")
            data = data[split]
        return Rows.of(str(folder), data.to_list())
    except InputError:
        raise
    except Exception as error:  # Arrow, JSON or the file system may raise any error
        raise InputError(
            f"`source` {folder} is not a readable data set ({first_line(error)}); save or download it again"
        ) from error
