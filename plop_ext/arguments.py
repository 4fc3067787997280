"""Checks of arguments that several functions share."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from plop_ext.errors import InputError

# Numbers above these are mistakes: they would take days, or more memory than there is.
MOST_SAMPLES = 1_000_000
MOST_PROBES = 16_384


def check_seed(**values: Any) -> None:
    """Check that seeds are in the range of numpy's generators."""
    check_whole(least=0, most=2**32 - 1, **values)


def check_whole(*, least: int = 1, most: int | None = None, **values: Any) -> None:
    """Check that arguments are whole numbers within a range, or None, which stands for a default.

    Args:
        least: Smallest value allowed.
        most: Largest value allowed; default any.
        **values: The arguments by name.

    Raises:
        InputError: If an argument is no whole number or out of range; the message names the first one.
    """
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Integral):
            raise InputError(f"`{name}` must be a whole number, got {value!r}")
        if int(value) < least:
            raise InputError(f"`{name}` must be at least {least}, got {value}")
        if most is not None and int(value) > most:
            raise InputError(f"`{name}` must be at most {most}, got {value}")
