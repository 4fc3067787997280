"""The runs of `plop score` over several data sets: one file each, in a folder."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from plop_ext.errors import InputError
from plop_ext.files import make_folder

# What may stand in the name of a file everywhere.
_UNSAFE = re.compile(r"[^\w.+=-]+")
_SUFFIXES = re.compile(r"(\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|bz2|xz|zst))+$")


def each_data(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the arguments of the run over each DATA; runs over several continue where an earlier command ended.

    Raises:
        InputError: If there are several DATA and no folder for their files, or two would have one file.
    """
    if len(args.data) == 1 and not (args.output or "").endswith("/"):
        return [_with(args, data=args.data[0])]
    if args.output is None:
        raise InputError("`--output` is missing; name a folder for the scores of several DATA")
    for name in ("heatmap", "stream", "dry_run"):
        if getattr(args, name):
            raise InputError(f"`--{name.replace('_', '-')}` takes one DATA; leave it out, or call plop for each")
    files: dict[str, str] = {}
    for data in args.data:
        name = file_name(data)
        if name in files:
            raise InputError(f"DATA {files[name]} and {data} would both be scored to {name}; call plop for each")
        files[name] = data
    args.launch.on_first(lambda: make_folder(args.output) and None)
    return [_with(args, data=data, output=str(Path(args.output, name)), resume=True) for name, data in files.items()]


def file_name(data: str) -> str:
    """Return the name of the file for the scores of a data set: its own name, or its path on the hub."""
    path = Path(data)
    name = _SUFFIXES.sub("", path.name) if path.exists() else data
    return f"{_UNSAFE.sub('--', name).strip('-') or 'data'}.json"


def _with(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **changes})
