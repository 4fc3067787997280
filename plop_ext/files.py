"""Files appear whole or not at all: written beside their destination, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp creates 0600; a result file gets the permissions any other new file would.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path` by rename."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` by rename."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
