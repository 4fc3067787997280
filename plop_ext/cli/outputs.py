"""The paths of a command, checked against each other and the disk before any work."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from plop_ext.errors import InputError, reason
from plop_ext.files import check_new_folder, check_writable, is_result, is_stdout, is_stream, resolve, same_file

# Options that name a file to write.
_ON_STDOUT = ("output", "heatmap", "plot")

Named = Mapping[str, "str | Path | None"]


def check(
    inputs: Named,
    outputs: Named,
    *,
    inside: Mapping[str, tuple[str, Sequence[str]]] | None = None,
    folders: Named | None = None,
    traces: Named | None = None,
    force: bool = False,
) -> None:
    """Check the paths of one command, before anything is replaced and anything slow runs.

    Args:
        inputs: What is read, by the name of its option; what is no path, such as a name on the hub, is ignored.
        outputs: Files to write. An existing one is refused without `force`; a device or a pipe is written to.
        inside: Further files to write: a folder that the command creates if necessary, and their names in it.
        folders: New folders to write.
        traces: Files and folders that the command keeps beside its outputs while it runs.
        force: Whether existing output files may be replaced. No input ever is.

    Raises:
        InputError: If an output is an input or another output, exists, or cannot be written.
    """
    read = _existing(inputs)
    files = {**outputs, **_inside(inside or {})}
    written = _resolved({**files, **(folders or {})})
    for name, path in {**written, **_resolved(traces or {})}.items():
        if not is_stream(path):
            _check_not_read(name, path, read)
    _check_distinct(written | _resolved({option: folder for option, (folder, _) in (inside or {}).items()}))
    for name, text in files.items():
        if text is None:
            continue
        if name in outputs:
            check_writable(text)
        if not force and written[name].is_file() and not is_stream(written[name]):
            raise InputError(f"`{name}` {text} exists; add --force to replace it, or name another file")
    for name, text in (folders or {}).items():
        if text is not None:
            check_new_folder(text, name)


def _inside(inside: Mapping[str, tuple[str, Sequence[str]]]) -> dict[str, str]:
    """Return the paths of files in folders, by the option and their name."""
    for option, (folder, _) in inside.items():
        if Path(folder).exists() and not Path(folder).is_dir():
            raise InputError(f"`{option}` {folder} is a file; name a folder")
    return {
        f"{option} {name}": str(Path(folder, name)) for option, (folder, names) in inside.items() for name in names
    }


def check_stdout(args: argparse.Namespace) -> bool:
    """Return whether a command writes an output file to standard output, where nothing else may be printed then.

    Raises:
        InputError: If --json is to be printed there too.
    """
    taken = [name for name in _ON_STDOUT if getattr(args, name, None) is not None and is_stdout(getattr(args, name))]
    if taken and args.json:
        raise InputError(f"`--json` and `--{taken[0]}` would both write to standard output; leave one out")
    return bool(taken)


def beside(output: str | None, suffix: str) -> Path | None:
    """Return the path of what a command keeps beside an output while it runs; None beside a device or a pipe."""
    return None if output is None or is_stream(resolve(output)) else Path(output + suffix)


def _existing(paths: Named) -> dict[str, Path]:
    """Return the inputs that are paths, over symbolic links; loading reports what cannot be read."""
    found = {}
    for name, text in paths.items():
        try:
            path = None if text is None else resolve(text)
            if path is not None and path.exists():
                found[name] = path
        except (OSError, InputError):
            continue
    return found


def _resolved(paths: Named) -> dict[str, Path]:
    """Return the paths that are given, over symbolic links."""
    found = {}
    for name, text in paths.items():
        if text is not None:
            try:
                found[name] = resolve(text)
            except OSError as error:
                raise InputError(f"`{name}` {text!s:.200}: {reason(error)}; check the path") from error
    return found


def _check_not_read(name: str, path: Path, read: Mapping[str, Path]) -> None:
    """Refuse an output that is an input, or an existing file of an input folder, except an earlier result."""
    for source, other in read.items():
        inside = other in path.parents and path.exists() and not is_result(path)
        if inside or same_file(path, other):
            raise InputError(f"`{name}` {path} would replace {source}, which this command reads; name another file")


def _check_distinct(written: Mapping[str, Path]) -> None:
    """Refuse two outputs in one place; a device may serve for several."""
    names = list(written)
    for index, name in enumerate(names):
        for other in names[:index]:
            if same_file(written[name], written[other]) and not is_stream(written[name]):
                raise InputError(f"`{other}` and `{name}` are both {written[name]}; name two files")
