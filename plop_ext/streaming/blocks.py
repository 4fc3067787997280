"""The loader of blocks: while one block runs, the next is loaded into the second of two reused buffers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.layers import LinearLayer, adapter_for
from plop_ext.models.reader import Pending, Reader, buffer_size, in_buffer
from plop_ext.scoring.baseline import WeightNorms, frobenius_norms
from plop_ext.streaming.skeleton import Skeleton
from plop_ext.streaming.weights import BlockTensors, Weights, meta_left, on_device


@dataclass(frozen=True)
class LoadedBlock:
    """A block with its weights.

    Attributes:
        index: Number of the block.
        module: A copy of the skeleton's block, so that attributes set by the forward are dropped with the copy.
        layers: The layers to score in the block.
        norms: Weight norms of these layers.
        ready: On CUDA, an event recorded when the weights are in place.
    """

    index: int
    module: nn.Module
    layers: tuple[LinearLayer, ...]
    norms: WeightNorms
    ready: torch.cuda.Event | None


@dataclass(frozen=True)
class _Ahead:
    """A block whose reading began before its buffer was free."""

    index: int
    writable: threading.Event
    pending: Pending


class BlockLoader:
    """Loads weights into the skeleton: first those outside of the blocks, then each block while the previous one runs.

    Args:
        skeleton: The model.
        weights: The checkpoint's tensors.
        device: Device to load to.

    Attributes:
        reader: The reader of the files.
    """

    def __init__(self, skeleton: Skeleton, weights: Weights, device: torch.device) -> None:
        self.reader = Reader(device)
        self._skeleton = skeleton
        self._weights = weights
        self._device = device
        self._codes = {part.key: part.code for block in (*weights.blocks, weights.outside) for part in block.all}
        self._pristine = list(skeleton.blocks)
        self._size = max(part.plain_bytes for part in weights.blocks)
        self._buffers: dict[int, Tensor] = {}
        self._outside: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="plop-load")
        self._next: Future[LoadedBlock] | None = None
        self._ahead: _Ahead | None = None

    def load_outside(self) -> None:
        """Load the weights that the model needs before its blocks, in this thread."""
        inside = {id(module) for module in self._skeleton.blocks.modules()}
        for module in self._skeleton.model.modules():
            if id(module) not in inside:
                self._outside += [(module, name, value) for name, value in module._parameters.items()]
        buffer = torch.empty(self._weights.outside.plain_bytes, dtype=torch.uint8, device=self._device)
        with self.reader.on_stream():
            self._place_groups(self._weights.outside)
            if self._weights.outside.plain:
                self._weights.place(self.reader.read(self._weights.outside.plain, buffer), self._codes)
        self._tie()
        if self.reader.stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self.reader.stream)
        on_device(self._skeleton.model, self._device)

    def _tie(self) -> None:
        """Set a shared parameter, which was loaded for one module, in all modules that share it."""
        loaded: dict[int, nn.Parameter] = {}
        for module, name, pristine in self._outside:
            value = module._parameters[name]
            if pristine is not None and value is not None and value is not pristine:
                loaded[id(pristine)] = value
        for module, name, pristine in self._outside:
            if pristine is not None:
                module._parameters[name] = loaded.get(id(pristine), pristine)

    def drop_outside(self) -> None:
        """Release the memory of the weights outside of the blocks."""
        for module, name, value in self._outside:
            module._parameters[name] = value
        self._outside.clear()

    def start(self, index: int) -> None:
        """Begin to load block `index`, in the buffer of block `index - 2`, which must not be used from now on."""
        if self.reader.stream is not None:
            used = torch.cuda.Event()
            used.record(torch.cuda.current_stream(self._device))
            self.reader.stream.wait_event(used)
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.writable.set()
        self._next = self._thread.submit(self._load, index, ahead)

    def wait(self) -> LoadedBlock:
        """Wait for the block of the last `start` and return it."""
        assert self._next is not None
        block = self._next.result()
        self._next = None
        if block.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(block.ready)
        return block

    def close(self) -> None:
        """End the threads and drop the buffers."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.reader.close(None if self._ahead is None else self._ahead.writable)
        self._buffers.clear()
        self.drop_outside()

    @torch.no_grad()
    def _load(self, index: int, ahead: _Ahead | None) -> LoadedBlock:
        pristine, part = self._pristine[index], self._weights.blocks[index]
        with self.reader.on_stream():
            tensors = None if ahead is None else self.reader.finish(ahead.pending)
            if tensors is None or ahead is None or ahead.index != index:  # a resumed run continues at another block
                tensors = self.reader.read(part.plain, self._buffer(index))
            module = _copied(pristine)
            self._skeleton.blocks[index] = module
            try:
                self._place_groups(part)
                self._ahead = self._begin(index + 1)  # read on while this block is being assembled
                if tensors:
                    self._weights.place(tensors, self._codes)
            finally:
                self._skeleton.blocks[index] = pristine
            left = meta_left(module)
            if left is not None:
                raise RuntimeError(f"{left} of block {index} has not been loaded")
            on_device(module, self._device)
            names = {id(child): name for name, child in pristine.named_modules()}
            layers = tuple(
                _with_values(layer, module.get_submodule(names[id(layer.module)])) for layer in self._of(index)
            )
            norms = frobenius_norms(layers)
            ready = None
            if self.reader.stream is not None:
                ready = torch.cuda.Event()
                ready.record(self.reader.stream)
        return LoadedBlock(index, module, layers, norms, ready)

    def _begin(self, index: int) -> _Ahead | None:
        """Begin to read as much of block `index` as fits into pinned memory while its buffer is in use.

        Return None while the weights outside of the blocks are loaded: a second buffer would exceed the plan.
        """
        if index >= len(self._weights.blocks) or self.reader.stream is None or self._outside:
            return None
        writable = threading.Event()
        plain = self._weights.blocks[index].plain
        return _Ahead(index, writable, self.reader.begin(plain, in_buffer(plain, self._buffer(index)), writable))

    def _buffer(self, index: int) -> Tensor:
        if index % 2 not in self._buffers:
            self._buffers[index % 2] = torch.empty(self._size, dtype=torch.uint8, device=self._device)
        return self._buffers[index % 2]

    def _place_groups(self, part: BlockTensors) -> None:
        for group in part.groups.values():
            # A separate buffer, because the converted parameter may be a view of it.
            stored = torch.empty(buffer_size(group), dtype=torch.uint8, device=self._device)
            self._weights.place(self.reader.read(group, stored), self._codes)

    def _of(self, index: int) -> Sequence[LinearLayer]:
        return [layer for layer in self._skeleton.found.layers if self._skeleton.block_of(layer.name) == index]


def _with_values(layer: LinearLayer, module: nn.Module) -> LinearLayer:
    """Return the layer for a module with values, which can tell what a forward of its own computes."""
    return replace(layer, module=module, adapter=adapter_for(module) or layer.adapter)


def _copied(block: nn.Module) -> nn.Module:
    """Return a copy of a block that shares its configuration and its weights on the meta device."""
    memo: dict[int, Any] = {id(weight): weight for weight in block.parameters() if weight.device.type == "meta"}
    for module in block.modules():
        config = getattr(module, "config", None)
        if config is not None:
            memo[id(config)] = config
    return copy.deepcopy(block, memo)
