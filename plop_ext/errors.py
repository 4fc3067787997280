"""The two errors that you can fix; any other exception is a defect of this package or of the model."""

from __future__ import annotations


class InputError(ValueError):
    """Invalid input: one line that says what is wrong, where, and the fix. The command exits with code 2."""


class SetupError(RuntimeError):
    """A missing package, device or connection: one line that names it and the fix. The command exits with code 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without punctuation at its end."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".: ")
