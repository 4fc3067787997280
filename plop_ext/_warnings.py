"""Warnings that point at the line that called this package."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

# Frames of the import system, between an import statement and the imported module, count as part of the package.
_SKIPPED = (
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
    os.path.dirname(importlib.__file__) + os.sep,
    "<frozen importlib",
)
_silent = ContextVar("silent", default=False)


@contextmanager
def silenced() -> Iterator[None]:
    """Issue no warning within the block, because another process issues the same."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that points at the innermost line outside this package.

    `warnings.warn(skip_file_prefixes=...)` does the same, from Python 3.12 on. Where there is no such line, as under
    `python -m plop_ext` in an embedded interpreter, the warning points at the outermost one.

    Args:
        message: Text of the warning.
        category: Class of the warning.
    """
    if _silent.get():
        return
    frame = _caller(sys._getframe(1))
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__", "<string>"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _caller(frame: FrameType) -> FrameType:
    while frame.f_code.co_filename.startswith(_SKIPPED) and frame.f_back is not None:
        frame = frame.f_back
    return frame
