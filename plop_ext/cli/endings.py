"""How a command ends that does not end well: one line on stderr, and an exit code."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Mapping

from plop_ext.cli.exit_codes import ExitCode
from plop_ext.cli.wording import command_words
from plop_ext.errors import InputError, SetupError, first_line, reason


def explain(error: BaseException, words: Mapping[str, str] | None, tell: bool = True) -> ExitCode:
    """Print one line about an exception that ended a command, and return the command's exit code.

    Args:
        error: The exception.
        words: Names of the command's own options, for its messages.
        tell: Whether to print; another process of the same command may.
    """
    if not tell:
        return _code(error)
    if isinstance(error, (InputError, SetupError)):
        return _say(command_words(str(error), words), ExitCode.INVALID)
    if isinstance(error, KeyboardInterrupt):
        return _say(
            "interrupted; no incomplete result was written, and plop score --resume continues a run with -o",
            ExitCode.INTERRUPTED,
        )
    if isinstance(error, OSError) and error.errno is not None:
        what = "standard output" if error.filename is None else f"`{error.filename}`"
        fix = "check that it exists and may be used, and that its disk has free space"
        return _say(f"cannot use {what}: {reason(error)}; {fix}", ExitCode.INVALID)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        fix = "lower --batch-size or --max-length, or score with --stream"
        return _say(f"out of memory ({first_line(error)}); {fix}", ExitCode.INVALID)
    return _say(
        f"defect: {type(error).__name__}: {first_line(error)}; the traceback is in {_keep(error)}, please report it",
        ExitCode.DEFECT,
    )


def _code(error: BaseException) -> ExitCode:
    """Return the exit code of a process that leaves the words to another one."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    return ExitCode.INVALID if isinstance(error, (InputError, SetupError, OSError, MemoryError)) else ExitCode.DEFECT


def _say(line: str, code: ExitCode) -> ExitCode:
    print(f"plop: {' '.join(line.split())}", file=sys.stderr)
    return code


def _keep(error: BaseException) -> str:
    """Write the traceback to a file and return its name, or print it where no file can be written."""
    lines = traceback.format_exception(error)
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="plop-", suffix=".log", delete=False
        ) as stream:
            stream.writelines(lines)
        return stream.name
    except OSError:
        print("".join(lines), file=sys.stderr)
        return "the lines above"
