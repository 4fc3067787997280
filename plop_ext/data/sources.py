"""Data sets by name: a local file or folder, a packaged data set, or one on the hub."""

from __future__ import annotations

import os
import random
import re
import sys
from pathlib import Path

from plop_ext import demo_assets
from plop_ext.arguments import MOST_SAMPLES, check_seed, check_type, check_whole
from plop_ext.data import folders, readers
from plop_ext.data.rows import Row, Rows
from plop_ext.demo_assets import arithmetic
from plop_ext.errors import InputError, SetupError, first_line, reason
from plop_ext.hub import cached_when_offline

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
_ARITHMETIC_ROWS = {"test": 500, "train": 5000}
_PROSE_TEST_EVERY = 10


def load_rows(
    source: str | os.PathLike[str], *, split: str = "train", max_samples: int | None = None, seed: int = 0
) -> Rows:
    """Load the rows of a data set.

    Args:
        source: One of

            - the path of a file: `.jsonl` or `.ndjson` (one JSON object per line), `.json` (an array of objects, an
              object with one such array, as in `{"data": [...]}`, or JSON lines), `.csv` (with a header line, and `,`,
              `;`, `|` or tabs between the fields), `.tsv`, `.parquet`, `.arrow`, or `.txt` (UTF-8; one row per line
              that is not blank, under the key `text`; lines are never joined, so reflow hard-wrapped prose to one
              paragraph per line first). Files may be compressed: `.gz`, `.bz2`, `.zst`, `.lz4`;
            - the path of a folder with such files, whose splits and shards `datasets` tells by their names, or of a
              folder that `Dataset.save_to_disk` wrote;
            - `"arithmetic"` (keys `prompt` and `completion`) or `"prose"` (key `text`), which ship with the package;
            - a data set on the hub, `owner/name` or `owner/name:configuration`.
        split: Split of a data set on the hub, in a folder, or of a packaged one. The packaged ones have `"train"` and
            `"test"`, which share no row. Ignored for a file, which has no splits.
        max_samples: Keep a random subset of this many rows, in their original order. Default all.
        seed: Seed of that subset.

    Returns:
        The rows as dicts, at least one, with their numbers in the whole data set and the places where they were found,
        which errors name.

    Raises:
        InputError: If the source cannot be found or read, or holds no row.
        SetupError: If the source is on the hub and the hub cannot be reached.

    Example:
        >>> from plop_ext.data import load_rows
        >>> sorted(load_rows("arithmetic", max_samples=1)[0])
        ['completion', 'prompt']
    """
    check_whole(most=MOST_SAMPLES, max_samples=max_samples)
    check_seed(seed=seed)
    check_type((str, os.PathLike), "the name or path of a data set", source=source)
    check_type(str, "the name of a split", split=split)
    source = os.fspath(source)
    rows = _rows(source, split, max_samples)
    if not rows:
        raise InputError(f"`source` {source} holds no rows; give a data set with at least one")
    if max_samples is not None and max_samples < len(rows):
        return rows.subset(sorted(random.Random(seed).sample(range(len(rows)), max_samples)))
    return rows


def check_source(source: str) -> None:
    """Check that a data set may exist, before something slow such as the loading of a model.

    Raises:
        InputError: If the name is neither that of a file, a folder or a packaged data set, nor one that the hub may
            have.
    """
    if source not in demo_assets.DATASETS:
        _local(source)


def _rows(source: str, split: str, max_samples: int | None) -> Rows:
    """Load all rows; of a packaged data set, at least `max_samples`."""
    if source in demo_assets.DATASETS:
        return Rows.of(source, _packaged_rows(source, split, max_samples))
    path = _local(source)
    if path is None:
        return Rows.of(source, _hub_rows(source, split))
    return readers.read(path) if path.is_file() else folders.read(path, split)


def _local(source: str) -> Path | None:
    """Return the file or folder that a source names, or None for one on the hub."""
    try:
        path = Path(source).expanduser()
        if path.is_file() or (path.is_dir() and source):
            return path
    except (OSError, RuntimeError) as error:  # a name too long, a folder without search permission, no home folder
        raise InputError(f"`source` {source:.200} cannot be read: {reason(error)}; check the path") from error
    if readers.extension(path) not in readers.READERS and _HUB_NAME.fullmatch(source):
        return None
    fix = "check the path"
    if source == "-":
        fix = "standard input is not read; save it to a file"
    elif set("*?") & set(source):
        fix = "give several files as a folder"
    raise InputError(f"`source` {source!r}: no such file; {fix}")


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
                f" ({', '.join(readers.READERS)}) or one of {', '.join(demo_assets.DATASETS)}"
            ) from error
        raise InputError(
            f"`source` {source!r} cannot be loaded from the hub with split {split!r}: {first_line(error)};"
            " check the name, `owner/name:configuration` and the split"
        ) from error
    finally:
        if not progress:
            datasets.enable_progress_bars()
