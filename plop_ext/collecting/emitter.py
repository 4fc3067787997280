"""The interface through which fused kernels emit the sums of squares of their inputs and outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from plop_ext.collecting.arena import Arena
from plop_ext.collecting.notes import IndexedLayers
from plop_ext.collecting.running_batch import RunningBatch
from plop_ext.collecting.token_map import TokenMap


class Emitter:
    """The interface of the running batch to kernels that pass over its rows. This base class discards all sums.

    Attributes:
        step: Distance between the rows whose sums are written.
        phase: The first of these rows.
    """

    step = 1
    phase = 0

    def make_room(self, vectors: int) -> None:
        """Reduce now, while no output is deferred, if there is no room for the next `vectors` vectors of sums."""

    def deferring(self, modules: Collection[nn.Module]) -> AbstractContextManager[None]:
        """Return a context in which the outputs of `modules` are left to kernels that call `output`."""
        return nullcontext()

    def output(self, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the tensor for the sums of a module's output, or of a part of it, and its bias; or (None, None)."""
        return None, None

    def input(self) -> Tensor | None:
        """Return the tensor for the sums of a kernel's result, for `register_input`; or None."""
        return None

    def projected(self, modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the tensors for the sums of two outputs that the next kernel computes from `x` without the modules.

        Args:
            modules: The two linear layers that the kernel replaces, or one layer of two parts; without biases.
            x: Their input [..., K].
        """
        return None, None

    def register_input(self, x: Tensor, sums: Tensor | None) -> None:
        """Register the `sums` that a kernel has written for `x`, the input of the next modules."""

    def flush_deferred(self) -> None:
        """Read the deferred outputs that no kernel has taken, and release them."""


NO_BATCH = Emitter()


class BatchEmitter(Emitter):
    """Stores the sums in an arena.

    Args:
        batch: The running batch.
        arena: The arena.
        token_map: The rows.
        layers_of: The scored layers of each module, with their rows in the totals.
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
        found = dict(zip(places, self._arena.add_projected(layers, x, self._map), strict=True))
        return found.get(0), found.get(1)

    def register_input(self, x: Tensor, sums: Tensor | None) -> None:
        if sums is not None:
            self._arena.inputs.add(x, int(sums.storage_offset()))

    def flush_deferred(self) -> None:
        self._arena.deferred.flush(self.step, self.phase)
