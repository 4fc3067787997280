"""Where the command's log records and warnings go."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from plop_ext.cli.wording import command_words

_DATA = logging.getLogger("plop_ext.data")


@contextmanager
def logs_on_stderr() -> Iterator[None]:
    """Send log records and warnings to stderr in the command's words; leave logging and warnings as found."""
    root, level, showwarning = logging.getLogger(), _DATA.level, warnings.showwarning
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("plop: %(message)s"))
    # A program that has set up logging and calls the command has its own way to show records.
    added = [] if root.handlers else [handler]
    for each in added:
        root.addHandler(each)
    warnings.showwarning = _show_warning
    try:
        yield
    finally:
        for each in added:
            root.removeHandler(each)
        _DATA.setLevel(level)
        warnings.showwarning = showwarning


def say_what_is_read() -> None:
    """Show as what the rows of the data are read, until the command ends."""
    _DATA.setLevel(logging.INFO)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return command_words(super().format(record))


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"plop: {command_words(' '.join(str(message).split()))}", file=sys.stderr)
