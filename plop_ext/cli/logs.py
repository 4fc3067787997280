"""Where the command's log records and warnings go."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from plop_ext.cli.wording import command_words

_PACKAGE = logging.getLogger("plop_ext")
_DATA = logging.getLogger("plop_ext.data")
_RUNS = logging.getLogger("plop_ext.runs")


@contextmanager
def logs_on_stderr(verbosity: int = 0) -> Iterator[None]:
    """Send log records and warnings to stderr in the command's words; leave logging and warnings as found.

    Args:
        verbosity: 0: warnings, and that a run is finished already; 1: also what this package does; 2: also what it
            does in detail; below 0: errors.
    """
    root, showwarning = logging.getLogger(), warnings.showwarning
    levels = {logger: logger.level for logger in (_PACKAGE, _DATA, _RUNS)}
    if verbosity == 0:
        _RUNS.setLevel(logging.INFO)
    elif verbosity > 0:
        _PACKAGE.setLevel(logging.INFO if verbosity == 1 else logging.DEBUG)
    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR if verbosity < 0 else logging.NOTSET)
    handler.setFormatter(_Formatter("plop: %(message)s"))
    # A program that has set up logging and calls the command has its own way to show records.
    added = [] if root.handlers else [handler]
    for each in added:
        root.addHandler(each)
    warnings.showwarning = _show_warning if verbosity >= 0 else _show_nothing
    try:
        yield
    finally:
        for each in added:
            root.removeHandler(each)
        for logger, level in levels.items():
            logger.setLevel(level)
        warnings.showwarning = showwarning


def say_what_is_read() -> None:
    """Show as what the rows of the data are read, until the command ends."""
    _DATA.setLevel(logging.INFO)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return command_words(super().format(record))


def _show_nothing(*_: object, **__: object) -> None:
    """Show no warning."""


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"plop: {command_words(' '.join(str(message).split()))}", file=sys.stderr)
