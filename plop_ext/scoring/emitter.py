"""Where fused kernels leave the sums of squares of what they read and write."""

from __future__ import annotations

from torch import Tensor

from plop_ext.scoring.arena import Arena
from plop_ext.scoring.token_map import BatchTokens, TokenMap


class Emitter:
    """The running batch, as kernels with its rows see it.

    Args:
        arena: Where the sums go.
        token_map: The rows.
        tokens: The batch.

    Attributes:
        step: Sums are written for every `step`-th row only ...
        phase: ... from this one on.
    """

    def __init__(self, arena: Arena, token_map: TokenMap, tokens: BatchTokens) -> None:
        self._arena = arena
        self._map = token_map
        self.step = tokens.step
        self.phase = tokens.phase

    def make_room(self, vectors: int) -> None:
        """Call where no output is deferred: reduces now what would else be reduced before the deferred are read."""
        self._arena.make_room(vectors, self._map)

    def output(self, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Where the sums of a module's output `y`, or of a part of it, go, and its bias; (None, None): nowhere."""
        return self._arena.output_sums(y) or (None, None)

    def input(self) -> Tensor | None:
        """Where the sums of a kernel's result go, for `know`."""
        return self._arena.input_sums(self._map)

    def know(self, x: Tensor, sums: Tensor | None) -> None:
        """The kernel has written `sums` of `x`, which modules will read as their input."""
        if sums is not None:
            self._arena.know_input(x, sums)

    def settle(self) -> None:
        """Read the deferred outputs that no kernel has asked for, and let go of them."""
        self._arena.settle()
