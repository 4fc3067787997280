"""How long the common start of two sequences is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the number of elements with which two sequences of one type both start."""
    low, high = 0, min(len(a), len(b))
    # Slices are compared at the speed of memory, elements at that of the interpreter.
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
