"""Counts, sizes and shares as people write them: 24, 10M, 1e9, 6GiB, 0.25, 5%."""

from __future__ import annotations

import math
import re
from numbers import Integral, Real
from typing import Any

from plop_ext.arguments import shown
from plop_ext.errors import InputError

_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_NUMBER = r"\s*(\d[\d_]*\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)\s*"
_COUNT = re.compile(_NUMBER + "([kmgbt]?)")
_SIZE = re.compile(_NUMBER + "([kmgt]i?|)b?")
_PERCENT = re.compile(_NUMBER + "%")
_PLAIN_SHARE = re.compile(r"\s*0?\.\d+\s*")
# The largest integer that files and arrays hold.
_MOST = 2**63 - 1


def count(value: Any, name: str) -> int:
    """Return a whole number of at least 1: 24, `"24"`, `"10M"`, `"1e9"`, 1e9.

    Args:
        value: The number; text may end in k, M, G, B or T.
        name: Name of the argument, for the error.

    Raises:
        InputError: If `value` is no such number.
    """
    return _whole(value, name, _COUNT, "a whole number (24, 10M, 1e9)")


def size(value: Any, name: str) -> int:
    """Return a number of bytes of at least 1: `"6GiB"`, `"500MB"`, 4096.

    Args:
        value: The size; text may end in kB, MB, GB, TB, KiB, MiB, GiB or TiB.
        name: Name of the argument, for the error.

    Raises:
        InputError: If `value` is no such size.
    """
    return _whole(value, name, _SIZE, "a size (6GiB, 500MB)")


def count_or_share(value: Any, name: str) -> int | float:
    """Return a count as an int, or a share in (0, 1] as a float: 0.25, `"0.25"`, `"5%"`.

    Raises:
        InputError: If `value` is neither.
    """
    found = _share(value)
    return _whole(value, name, _COUNT, "a number (24, 10M) or a fraction (0.25, 5%)") if found is None else found


def size_or_share(value: Any, name: str) -> int | float:
    """Return a size in bytes as an int, or a share in (0, 1] as a float.

    Raises:
        InputError: If `value` is neither.
    """
    found = _share(value)
    return _whole(value, name, _SIZE, "a size (6GiB, 500MB) or a fraction (0.25, 5%)") if found is None else found


def _share(value: Any) -> float | None:
    """Return the share that `value` is, or None."""
    if isinstance(value, str):
        percent = _PERCENT.fullmatch(value.lower())
        if percent is not None:
            value = float(percent[1].replace("_", "")) / 100
        elif _PLAIN_SHARE.fullmatch(value):
            value = float(value)
        else:
            return None
    elif isinstance(value, (bool, Integral)) or not isinstance(value, Real):
        return None
    return float(value) if 0 < value <= 1 else None


def _whole(value: Any, name: str, pattern: re.Pattern[str], wanted: str) -> int:
    """Return the whole number that `value` is, as a number or as text that `pattern` matches."""
    number: Any = None
    if isinstance(value, str):
        match = pattern.fullmatch(value.lower())
        if match is not None:
            digits = match[1].replace("_", "")
            scale = (_SCALES | _BINARY)[match[2]]
            exact = digits.isdecimal() and len(digits) <= 30
            number = int(digits) * scale if exact else _rounded(float(digits) * scale)
    elif isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
    elif isinstance(value, Real) and not isinstance(value, bool):
        number = int(float(value)) if math.isfinite(value) and float(value).is_integer() else None
    if number is None or not 1 <= number <= _MOST:
        raise InputError(f"`{name}` must be {wanted}, got {shown(value)}")
    return int(number)


def _rounded(value: float) -> int | None:
    """Return the whole number below; None for a number that is not finite, or not whole and small."""
    if not math.isfinite(value) or (value < 1000 and value % 1):
        return None
    return int(value)
