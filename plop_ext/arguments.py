"""Checks that arguments share."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from plop_ext.errors import InputError


def check_seed(**values: Any) -> None:
    """Refuse seeds that numpy's generators do not take."""
    check_whole(least=0, most=2**32 - 1, **values)


def check_whole(*, least: int = 1, most: int | None = None, **values: Any) -> None:
    """Refuse arguments that are no whole number, or out of range; None passes, which leaves the choice to the callee.

    Args:
        least: Smallest value allowed.
        most: Largest value allowed; default any.
        **values: The arguments by name.

    Raises:
        InputError: For the first that is refused.
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
