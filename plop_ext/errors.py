"""The two errors a user can mend; everything else that is raised is a defect of this package or of the model."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: one line that says what is wrong, where, and the fix. The command exits with code 2."""


class SetupError(RuntimeError):
    """The environment lacks something: one line that says what, and how to install or enable it. Exit code 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without the punctuation that ends it."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".: ")
