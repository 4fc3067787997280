"""Atomic writes, by renaming a temporary file beside the destination, and checked reads of JSON files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plop_ext.errors import InputError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` on success, remove it on failure.

    Args:
        path: Destination. Its folder must exist and be writable.

    Raises:
        InputError: If the folder does not exist or cannot be written.
    """
    destination = Path(path)
    temporary = _sibling(destination)
    try:
        yield temporary
        share(temporary)
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that `path` can be written by `atomic_path`, without leaving anything there.

    Raises:
        InputError: If `path` is a folder, or the folder that holds it does not exist or cannot be written.
    """
    _sibling(Path(path)).unlink()


def share(path: Path) -> None:
    """Set the permissions of a private temporary file or folder to those of an ordinary new one."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path` by rename."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str], file_format: str, version: int, writer: str) -> dict[str, Any]:
    """Read a JSON file that this package wrote, and check its format and version.

    Raises:
        InputError: If the file cannot be read, is not JSON, is another kind of file, or has another version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}; name a file written by {writer}") from error
    except (ValueError, RecursionError) as error:  # also invalid UTF-8, numbers of over 4,300 digits, endless nesting
        raise InputError(f"`{path}` is not JSON; name a file written by {writer}") from error
    if not isinstance(content, dict) or content.get("format") != file_format:
        kind = content.get("format", "another JSON file") if isinstance(content, dict) else "another JSON file"
        raise InputError(f"`{path}` is not a {file_format} file but {kind}; name a file written by {writer}")
    if content.get("version") != version:
        raise InputError(
            f"`{path}` has version {content.get('version')} of {file_format}, this plop_ext reads version {version}; "
            f"write it again with {writer}"
        )
    return content


def _sibling(destination: Path) -> Path:
    """Create an empty, private file beside `destination`."""
    if destination.is_dir():
        raise InputError(f"`{destination}` is a folder; name a file in it")
    try:
        handle, name = tempfile.mkstemp(
            prefix=f".{destination.name}.", suffix=destination.suffix, dir=destination.parent
        )
    except OSError as error:
        raise InputError(
            f"cannot write `{destination}`: {error.strerror}; name a writable folder that exists"
        ) from error
    os.close(handle)
    return Path(name)
