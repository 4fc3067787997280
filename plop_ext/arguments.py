"""Checks of arguments that several functions share."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

from plop_ext.errors import InputError

# Numbers above these are mistakes: they would take days, or more memory than there is.
MOST_SAMPLES = 1_000_000
MOST_PROBES = 16_384
# Padding to a multiple of more tokens than this, or than twice the longest sample, is a mistake.
USUAL_LENGTH = 4096


def check_seed(**values: Any) -> None:
    """Check that seeds are in the range of numpy's generators."""
    check_whole(least=0, most=2**32 - 1, required=True, **values)


def check_whole(*, least: int = 1, most: int | None = None, required: bool = False, **values: Any) -> None:
    """Check that arguments are whole numbers within a range, or None, which stands for a default.

    Args:
        least: Smallest value allowed.
        required: Refuse None.
        most: Largest value allowed; default any that files and arrays hold.
        **values: The arguments by name.

    Raises:
        InputError: If an argument is no whole number or out of range; the message names the first one.
    """
    for name, value in values.items():
        if value is None and not required:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise InputError(f"`{name}` must be a whole number, got {shown(value)}")
        _check_range(name, value, least, 2**63 - 1 if most is None else most)


def check_number(*, above: float = -math.inf, most: float = math.inf, required: bool = False, **values: Any) -> None:
    """Check that arguments are finite numbers above one bound and at most another, or None unless `required`.

    Raises:
        InputError: If an argument is no number or out of range; the message names the first one.
    """
    for name, value in values.items():
        if value is None and not required:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
            raise InputError(f"`{name}` must be a number, got {shown(value)}")
        if not above < float(value) <= most or math.isinf(value):
            bounds = [f"above {above:g}"] * math.isfinite(above) + [f"at most {most:g}"] * math.isfinite(most)
            raise InputError(f"`{name}` must be {' and '.join(bounds) or 'finite'}, got {shown(value)}")


def check_choice(choices: Collection[Any], **values: Any) -> None:
    """Check that arguments are among `choices`.

    Raises:
        InputError: If one is not; the message names it and the choices.
    """
    for name, value in values.items():
        if not (value is None or isinstance(value, str)) or value not in choices:
            raise InputError(f"`{name}` must be one of {', '.join(map(str, choices))}, got {shown(value)}")


def check_type(wanted: type | tuple[type, ...], what: str, **values: Any) -> None:
    """Check that arguments are of a type.

    Args:
        wanted: The type or types.
        what: What they are, for the error.
        **values: The arguments by name.

    Raises:
        InputError: If one is not; the message names it.
    """
    for name, value in values.items():
        if not isinstance(value, wanted):
            raise InputError(f"`{name}` must be {what}, got {shown(value)}")


def check_flags(**values: Any) -> None:
    """Check that arguments are True or False.

    Raises:
        InputError: If one is not; the message names it.
    """
    check_type(bool, "True or False", **values)


def check_functions(**values: Any) -> None:
    """Check that arguments are functions, or None.

    Raises:
        InputError: If one is not; the message names it.
    """
    for name, value in values.items():
        if value is not None and not callable(value):
            raise InputError(f"`{name}` must be a function, got {shown(value)}")


def shown(value: Any) -> str:
    """Return a value for a message: itself if it is short and plain, otherwise its type."""
    plain = isinstance(value, (str, bytes, bool, int, float, type(None), list, tuple, dict, set))
    text = repr(value) if plain else ""
    return text if plain and len(text) <= 100 and "\n" not in text else f"a value of type {type(value).__name__}"


def _check_range(name: str, value: Any, least: int, most: int) -> None:
    if int(value) < least:
        raise InputError(f"`{name}` must be at least {least}, got {value}")
    if int(value) > most:
        raise InputError(f"`{name}` must be at most {most}, got {value}")
