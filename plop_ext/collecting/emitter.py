"""Where fused kernels leave the sums of squares of what they read and write."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from plop_ext.collecting.arena import Arena
from plop_ext.collecting.notes import IndexedLayers
from plop_ext.collecting.running_batch import RunningBatch
from plop_ext.collecting.token_map import TokenMap


class Emitter:
    """The running batch as kernels see it that pass over its rows. This one is of no batch: no sums go anywhere.

    Attributes:
        step: Sums are written for every `step`-th row only ...
        phase: ... from this one on.
    """

    step = 1
    phase = 0

    def make_room(self, vectors: int) -> None:
        """Reduce now, while no output is deferred, what the next `vectors` sums would not leave room for."""

    def deferring(self, modules: Collection[nn.Module]) -> AbstractContextManager[None]:
        """Within the block leave the outputs of `modules` to kernels that ask for their places by `output`."""
        return nullcontext()

    def output(self, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return where the sums of a module's output, or of a part of it, go, and its bias; (None, None): nowhere."""
        return None, None

    def input(self) -> Tensor | None:
        """Return where the sums of a kernel's result go, for `register_input`; None: nowhere."""
        return None

    def projected(self, modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return where the sums of two outputs go that the next kernel computes from `x`, without calling modules.

        Args:
            modules: The two linear layers it stands for, or the one of two parts; without biases.
            x: Their input [..., K].
        """
        return None, None

    def register_input(self, x: Tensor, sums: Tensor | None) -> None:
        """Note that a kernel has written the `sums` of `x`, which modules will read as their input."""

    def flush_deferred(self) -> None:
        """Read the deferred outputs that no kernel has asked for, and let go of them."""


NO_BATCH = Emitter()


class BatchEmitter(Emitter):
    """Puts the sums into an arena.

    Args:
        batch: The running batch.
        arena: Where the sums go.
        token_map: The rows.
        layers_of: What is scored of a module, with the rows of the totals.
    """

    def __init__(
        self, batch: RunningBatch, arena: Arena, token_map: TokenMap, layers_of: Mapping[nn.Module, IndexedLayers]
    ) -> None:
        self._batch = batch
        self._arena = arena
        self._map = token_map
        self._layers_of = layers_of
        self.step = token_map.step
        self.phase = token_map.phase

    def make_room(self, vectors: int) -> None:
        self._arena.make_room(vectors, self._map)

    def deferring(self, modules: Collection[nn.Module]) -> AbstractContextManager[None]:
        return self._batch.deferring(modules)

    def output(self, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self._arena.deferred.take(y) or (None, None)

    def input(self) -> Tensor | None:
        return self._arena.input_sums(self._map)

    def projected(self, modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        layers, places = [], []
        for position, module in enumerate(modules):
            for index, layer in self._layers_of.get(module, ()):
                layers.append((index, layer))
                places.append(position if layer.split is None else layer.part)
        if not layers:
            return None, None
        if not self._map.masked:
            self._batch.notes.count_all(layers)
        found = dict(zip(places, self._arena.add_projected(layers, x, self._map), strict=True))
        return found.get(0), found.get(1)

    def register_input(self, x: Tensor, sums: Tensor | None) -> None:
        if sums is not None:
            self._arena.inputs.add(x, int(sums.storage_offset()))

    def flush_deferred(self) -> None:
        self._arena.deferred.flush(self.step, self.phase)
