"""The sums that fused kernels accumulate instead of hooks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from plop_ext.collecting.emitter import NO_BATCH, BatchEmitter, Emitter
from plop_ext.collecting.hooks import Hook
from plop_ext.collecting.recording import Recording
from plop_ext.collecting.token_map import Reading, TokenMap
from plop_ext.layers import is_plain_product
from plop_ext.layers.streams import TEXT


class FusedSums:
    """The access of the fused kernels of a block to a collector's recording.

    Args:
        recording: The recording of the collector.
        block: The block; None for access to the hooks only.
    """

    def __init__(self, recording: Recording, block: nn.Module | None = None) -> None:
        self._recording = recording
        found = (recording.layers_of.get(module, ()) for module in (() if block is None else block.modules()))
        self._stream = next((layers[0][1].stream for layers in found if layers), TEXT)

    def emitter(self, x: Tensor) -> Emitter:
        """Return the emitter for a kernel that passes over tensors with the rows of `x` [..., K]."""
        batch = self._recording.batch
        token_map = None if batch is None else batch.tokens.map_for(self._reading(x), x.device)
        if batch is None or not isinstance(token_map, TokenMap):
            return NO_BATCH
        return BatchEmitter(batch, batch.arena_for(x.device, x.dtype), token_map, self._recording.layers_of)

    def bypassable(self, modules: Sequence[nn.Module], x: Tensor) -> bool:
        """Return whether a kernel may replace linear layers that read `x` [..., K], and emit their outputs' sums.

        Args:
            modules: Two layers, or one layer of two parts, of which nothing else is scored.
            x: Their input.
        """
        if len(set(modules)) < len(modules):
            return False
        if any(not self.owns(hook) for module in modules for hook in module._forward_hooks.values()):
            return False
        batch = self._recording.batch
        if batch is None:
            return True
        layers = [layer for module in modules for _, layer in self._recording.layers_of.get(module, ())]
        return (
            not self._recording.last_call_only
            and not batch.tokens.streams.time_first(self._stream, False, x.shape)
            and isinstance(batch.tokens.map_for(self._reading(x), x.device), TokenMap)
            and all((layer.split is None) == (len(modules) == 2) for layer in layers)
            and all(is_plain_product(layer.adapter) for layer in layers)
        )

    def _reading(self, x: Tensor) -> Reading:
        return Reading(self._stream, x.shape[:-1].numel())

    def owns(self, hook: object) -> bool:
        """Return whether a forward hook belongs to the collector."""
        return isinstance(hook, Hook) and hook.recording is self._recording
