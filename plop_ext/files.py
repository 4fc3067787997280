"""Outputs that are whole or absent and never replace what is no file, and checked reads of JSON files.

A file is written beside its destination and renamed. The destination is what a symbolic link leads to. A device, a
pipe or a descriptor such as /dev/stdout cannot be renamed to; it is written through.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from plop_ext.arguments import check_flags, check_type
from plop_ext.errors import InputError, OutputError, first_line, reason

try:
    import orjson
except ImportError:  # Python's own module reads the same, several times slower
    orjson = None  # type: ignore[assignment]

# Bytes of a file that are read to tell its kind.
_OPENING = 256
_FULL, _TAKEN = "free some space, or name another place", "another process writes it; name another place"
_FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), _TAKEN),
    errno.ENXIO: "start the reader of the pipe first",
    errno.ENAMETOOLONG: "give a shorter name",
}


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the system refuses while `path` is written within the block into a one-line error.

    Raises:
        OutputError: If the block raises an `OSError`.
    """
    try:
        yield
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, "name a writable folder that exists")
        raise OutputError(f"cannot write `{path}`: {reason(error)}; {fix}") from error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary file; its content becomes that of `path` on success, and is removed on failure.

    Args:
        path: Destination. Its folder must exist and be writable. An existing file is replaced.

    Raises:
        OutputError: If the destination is a folder, or cannot be written; it is then as it was before.
    """
    with writing(path):
        destination = resolve(path)
        through = is_stream(destination)
        temporary = _new_file(None if through else destination)
        try:
            yield temporary
            if through:
                _write_through(temporary, destination)
            else:
                share(temporary, like=destination)
                os.replace(temporary, destination)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder; it becomes `path`, which is new or empty, on success, and is removed on failure.

    Raises:
        OutputError: If the folder is in use or cannot be written.
    """
    with writing(path):
        destination = resolve(path)
        temporary = Path(tempfile.mkdtemp(prefix=".plop-", dir=destination.parent))
        try:
            yield temporary
            for item in (temporary, *temporary.rglob("*")):
                share(item)
            os.replace(temporary, destination)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that `path` can be written by `atomic_path`, without leaving anything there.

    Raises:
        OutputError: If `path` is a folder, or the folder that holds it does not exist or cannot be written.
    """
    with writing(path):
        destination = resolve(path)
        if not is_stream(destination):
            with suppress(FileNotFoundError):
                os.lstat(destination)  # a name that is too long
            _new_file(destination).unlink()
        elif _descriptor(destination) is None and not os.access(destination, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_new_folder(path: str | os.PathLike[str], name: str) -> None:
    """Check that `path` can be written by `atomic_folder`, without leaving anything there.

    Args:
        path: The folder.
        name: Name of the argument or option, for the error.

    Raises:
        OutputError: If `path` is no folder or holds anything, or its parent cannot be written.
    """
    with writing(path):
        folder = resolve(path)
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"`{name}` {path} is a file; name a new folder")
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError(f"`{name}` {path} is not empty; name a new folder, or remove this one")
        os.rmdir(tempfile.mkdtemp(prefix=".plop-", dir=folder.parent))


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder with its parents, unless it exists.

    Raises:
        OutputError: If it cannot be created.
    """
    with writing(path):
        folder = resolve(path)
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"cannot write `{path}`: it is a file; name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path that `path` leads to over symbolic links, up to a descriptor of this process.

    Raises:
        OSError: If the links form a loop, or a folder of the path cannot be searched.
        OutputError: If `path` is no path.
    """
    try:
        if not os.fspath(path):
            raise ValueError("empty")
        found = Path(path).expanduser()
        if "\0" in str(found):
            raise ValueError("embedded null byte")
        for _ in range(40):  # the limit of Linux on links in one path
            found = Path(os.path.realpath(found.parent)) / found.name
            if found.name == "..":
                return Path(os.path.realpath(found))
            if _descriptor(found) is not None or not found.is_symlink():
                return found
            found = found.parent / os.readlink(found)
    except (TypeError, ValueError, RuntimeError) as error:  # no string, a zero byte, an unknown home folder
        raise OutputError(f"{path!r} is no path ({first_line(error)}); name a file") from error
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def same_file(first: Path, second: Path) -> bool:
    """Return whether two resolved paths are one file: by name, or by inode if both exist."""
    if first == second:
        return True
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def is_stream(destination: Path) -> bool:
    """Return whether a resolved path exists and is neither file nor folder: a device, a pipe, a descriptor."""
    if _descriptor(destination) is not None:
        return True
    try:
        mode = destination.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_stdout(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is the standard output of this process."""
    with writing(path):
        return _descriptor(resolve(path)) == 1


def is_result(path: Path, kind: str = "plop_ext.") -> bool:
    """Return whether a file is a result of this package whose format starts with `kind`."""
    try:
        with path.open("rb") as stream:
            return stream.read(_OPENING).decode("utf-8", "replace").startswith(f'{{\n "format": "{kind}')
    except OSError:
        return False


def share(path: Path, like: Path | None = None) -> None:
    """Set the permissions of a private temporary file or folder to those of `like` if it exists, or of a new one."""
    if like is not None and like.exists():
        path.chmod(stat.S_IMODE(like.stat().st_mode))
        return
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically; halves of characters are written as escapes.

    Raises:
        OutputError: If `path` cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], overwrite: bool = False) -> None:
    """Write a result of this package as JSON atomically.

    Args:
        path: Destination.
        content: The result; `"format"`, which comes first, says of what kind it is.
        overwrite: Replace any file. By default only an empty file and an earlier result of the same kind are.

    Raises:
        OutputError: If `path` cannot be written, or is another file and `overwrite` is false.
    """
    check_flags(overwrite=overwrite)
    if not overwrite:
        with writing(path):
            _check_replaceable(path, f'{content["format"]}"')
    entries = ",\n".join(f" {json.dumps(key)}: {_lines(value)}" for key, value in content.items())
    write_text_atomic(path, f"{{\n{entries}\n}}\n")


def save_or_rescue(write: Callable[[Path], object], path: str | os.PathLike[str]) -> None:
    """Call `write(path)`; if `path` cannot be written, write to another place, because a result is not lost for that.

    Args:
        write: Writes the result to a path atomically.
        path: Where it should go.

    Raises:
        OutputError: If `path` cannot be written; it says where the result is instead.
    """
    try:
        write(Path(path))
    except OutputError as error:
        for folder in (os.path.expanduser("~"), tempfile.gettempdir()):
            spare = _rescue(write, folder, Path(path).name)
            if spare is not None:
                raise OutputError(f"{error}; the result was saved as `{spare}` instead") from error
        raise


@contextmanager
def uncollected() -> Iterator[None]:
    """Turn the garbage collector off within the block, which makes many objects and no garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def read_whole(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a file, a terminal, or a pipe to which something writes.

    Raises:
        OSError: If it cannot be read, is a device such as /dev/zero, whose content never ends, or is a pipe to which
            nothing writes, for whose content there is no end of waiting.
    """
    # Otherwise opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not file.isatty()):
            raise OSError(errno.EINVAL, "it is a device, not a file")
        if hasattr(os, "set_blocking"):
            os.set_blocking(descriptor, True)
        content = file.read()
    if stat.S_ISFIFO(mode) and not content:
        raise OSError(errno.EPIPE, "it is a pipe to which nothing writes")
    return content


def read_json(path: str | os.PathLike[str], file_format: str, version: int, writer: str) -> dict[str, Any]:
    """Read a JSON file that this package wrote, and check its format and version.

    Raises:
        InputError: If the file cannot be read, is not JSON, is another kind of file, or has another version.
    """
    check_type((str, os.PathLike), f"the path of a file written by {writer}", path=path)
    try:
        content = _parse(read_whole(path))
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {reason(error)}; name a file written by {writer}") from error
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


def _parse(content: bytes) -> Any:
    """Parse JSON."""
    with uncollected():
        if orjson is not None:
            # It refuses NaN, which Python's own module reads.
            with suppress(orjson.JSONDecodeError):
                return orjson.loads(content)
        return json.loads(content.decode())


def _lines(value: Any) -> str:
    """Return a value as JSON on one line, or a list of objects with one of them on each."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return json.dumps(value)
    return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"


def _descriptor(destination: Path) -> int | None:
    """Return the number of the descriptor of this process that a path such as /dev/fd/1 names, or None."""
    # The links in these folders lead to no path that could be renamed to.
    folders = "/dev/fd", "/proc/self/fd", f"/proc/{os.getpid()}/fd"
    named = str(destination.parent) in folders and destination.name.isdecimal()
    return int(destination.name) if named else None


def _new_file(destination: Path | None) -> Path:
    """Create an empty, private file beside `destination`, or among the temporary files."""
    if destination is not None and destination.is_dir():
        raise OutputError(f"`{destination}` is a folder; name a file in it")
    folder, suffix = (None, "") if destination is None else (destination.parent, destination.suffix[:16])
    handle, name = tempfile.mkstemp(prefix=".plop-", suffix=suffix, dir=folder)
    os.close(handle)
    return Path(name)


def _write_through(source: Path, destination: Path) -> None:
    """Copy a file to a device, a pipe or a descriptor."""
    number = _descriptor(destination)
    if number is None:
        # A pipe without a reader fails at once; otherwise it would be waited for without end.
        handle = os.open(destination, os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(handle, True)
    else:
        sys.stdout.flush()
        handle = os.dup(number)
    with open(handle, "wb") as stream, source.open("rb") as content:
        shutil.copyfileobj(content, stream)


def _check_replaceable(path: str | os.PathLike[str], kind: str) -> None:
    """Refuse to replace a file with something in it that is no result of `kind`."""
    destination = resolve(path)
    if is_stream(destination) or not destination.is_file() or destination.stat().st_size == 0:
        return
    if not is_result(destination, kind):
        raise OutputError(f"`{path}` exists and is another kind of file; name another, or set `overwrite`")


def _rescue(write: Callable[[Path], object], folder: str, name: str) -> Path | None:
    """Write a result into a new folder of `folder`; return where, or None if that fails too."""
    try:
        spare = Path(tempfile.mkdtemp(prefix="plop-rescued-", dir=folder))
    except OSError:
        return None
    try:
        write(spare / name)
    except OutputError:
        shutil.rmtree(spare, ignore_errors=True)
        return None
    return spare / name
