"""Inputs whose sums of squares are already in the arena: q, k and v share one, gate and up another."""

from __future__ import annotations

import weakref

from torch import Tensor


class SummedInputs:
    """The places of the sums of inputs, by tensor and version.

    A weak reference keeps no activation alive, and detects when an id is reused. A tensor of inference mode is never
    found, because it has no version, by which a modification could be detected.
    """

    def __init__(self) -> None:
        self._places: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}

    def add(self, x: Tensor, place: int) -> None:
        """Record the place of the sums of the present version of `x`."""
        if not x.is_inference():
            self._places[id(x)] = (weakref.ref(x), x._version, place)

    def find(self, x: Tensor) -> int | None:
        """Return the place of the sums of the present version of `x`, or None."""
        known = self._places.get(id(x))
        return known[2] if known is not None and known[0]() is x and known[1] == x._version else None

    def clear(self) -> None:
        self._places.clear()
