"""The errors that you can fix; any other exception is a defect of this package or of the model."""

from __future__ import annotations


class InputError(ValueError):
    """Invalid input. The message, of one line, names the problem, the place and the fix; `plop` exits with 2."""


class OutputError(InputError):
    """An output that cannot be written, because of its name, its folder or the disk."""


class SetupError(RuntimeError):
    """A missing package, device or connection. The message names what is missing and the fix; `plop` exits with 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without punctuation at its end."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".: ")


def reason(error: Exception) -> str:
    """Return why a file cannot be read or written, in the words of the system and without the file's name."""
    return getattr(error, "strerror", None) or first_line(error)
