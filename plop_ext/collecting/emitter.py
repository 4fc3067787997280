"""Where fused kernels leave the sums of squares of what they read and write."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from plop_ext.collecting.arena import Arena
from plop_ext.collecting.token_map import TokenMap
from plop_ext.layers import LinearLayer

Parts = Sequence[tuple[int, LinearLayer]]


class Emitter:
    """The running batch, as kernels with its rows see it; this one is of no batch, and no sums go anywhere.

    Attributes:
        step: Sums are written for every `step`-th row only ...
        phase: ... from this one on.
    """

    step = 1
    phase = 0

    def make_room(self, vectors: int) -> None:
        """Call where no output is deferred: reduces now what would else be reduced before the deferred are read."""

    def output(self, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Where the sums of a module's output `y`, or of a part of it, go, and its bias; (None, None): nowhere."""
        return None, None

    def input(self) -> Tensor | None:
        """Where the sums of a kernel's result go, for `know`; None: nowhere."""
        return None

    def projected(self, modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Where the sums of two outputs go that the next kernel computes from `x`, so that no module is called.

        Args:
            modules: The two linear layers it stands for, or the one of two parts; without biases.
            x: Their input [..., K].
        """
        return None, None

    def know(self, x: Tensor, sums: Tensor | None) -> None:
        """The kernel has written `sums` of `x`, which modules will read as their input."""

    def settle(self) -> None:
        """Read the deferred outputs that no kernel has asked for, and let go of them."""


SILENT = Emitter()


class BatchEmitter(Emitter):
    """Puts the sums into an arena.

    Args:
        arena: Where the sums go.
        token_map: The rows.
        parts: What is scored of a module, with the rows of the totals.
    """

    def __init__(self, arena: Arena, token_map: TokenMap, parts: Callable[[nn.Module], Parts]) -> None:
        self._arena = arena
        self._map = token_map
        self._parts = parts
        self.step = token_map.step
        self.phase = token_map.phase

    def make_room(self, vectors: int) -> None:
        self._arena.make_room(vectors, self._map)

    def output(self, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self._arena.output_sums(y) or (None, None)

    def input(self) -> Tensor | None:
        return self._arena.input_sums(self._map)

    def projected(self, modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        layers, places = [], []
        for position, module in enumerate(modules):
            for index, layer in self._parts(module):
                layers.append((index, layer))
                places.append(position if layer.split is None else layer.part)
        if not layers:
            return None, None
        found = dict(zip(places, self._arena.add_projected(layers, x, self._map), strict=True))
        return found.get(0), found.get(1)

    def know(self, x: Tensor, sums: Tensor | None) -> None:
        if sums is not None:
            self._arena.know_input(x, sums)

    def settle(self) -> None:
        self._arena.settle()
