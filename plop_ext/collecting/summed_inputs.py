"""Inputs whose sums of squares are there already: q, k and v share one, gate and up another."""

from __future__ import annotations

import weakref

from torch import Tensor


class SummedInputs:
    """The places of the sums of inputs, by tensor and version.

    A weak reference keeps no activation alive, and is not mistaken when an id is used again. A tensor of inference
    mode is never found: it counts no modifications, so that nothing would tell whether its sums still hold.
    """

    def __init__(self) -> None:
        self._places: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}

    def add(self, x: Tensor, place: int) -> None:
        """Note where the sums of `x`, as it is now, are."""
        if not x.is_inference():
            self._places[id(x)] = (weakref.ref(x), x._version, place)

    def find(self, x: Tensor) -> int | None:
        """Return where the sums of `x`, as it is now, are; None if they are not there."""
        known = self._places.get(id(x))
        return known[2] if known is not None and known[0]() is x and known[1] == x._version else None

    def clear(self) -> None:
        self._places.clear()
