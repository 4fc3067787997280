"""Compiled forwards beside an eager one: copies of a model that share its weights, and hooks that compile with them.

Dynamo keeps compiled code with the Python code object it came from, and its guards leave hooks out: what was compiled
without hooks would also run a model with hooks, and skip them. So each copy compiles a code object of its own, after
its hooks are attached.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext import ops
from plop_ext.layers import LinearLayer


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model without hooks that shares its parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


class Compiler:
    """Compiles one model, for the shapes it is first called with.

    Attributes:
        graphs: Graphs compiled so far.
    """

    def __init__(self) -> None:
        self.graphs = 0

    def blocks(self, model: nn.Module) -> None:
        """Compile each decoder block: one compilation serves all of them."""
        compiled = self._forward("block_forward")
        for block in model.layers:  # type: ignore[union-attr]
            block.forward = partial(compiled, block)

    def whole(self, model: nn.Module) -> None:
        """Compile the forward of the whole model."""
        model.forward = partial(self._forward("model_forward"), model)

    def _forward(self, name: str) -> Callable[..., Any]:
        code = _forward.__code__.replace(co_name=name)
        return torch.compile(FunctionType(code, _forward.__globals__, name), dynamic=False, backend=self._inductor)

    def _inductor(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.graphs += 1
        return compile_fx(graph, inputs)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


@contextmanager
def eager_masks() -> Iterator[None]:
    """Within the block transformers makes the attention mask for token ids alone that an eager forward gets: none.

    A traced or captured forward may look at no values, and would take the slower attention of masked and of packed
    sequences.
    """
    from transformers import masking_utils

    eager = {"find_packed_sequence_indices": _not_packed, "is_tracing": _not_tracing}
    kept = {name: getattr(masking_utils, name) for name in eager}
    vars(masking_utils).update(eager)
    try:
        yield
    finally:
        vars(masking_utils).update(kept)


# Module-level functions: compiled code is guarded by their identity.
def _not_packed(position_ids: Tensor) -> None:
    return None


def _not_tracing(tensor: Tensor | None = None) -> bool:
    return False


class StaticHooks:
    """Hooks of plain linear modules that compile without a graph break or one graph per block.

    Which modules share an input is found out in an eager forward; the sums of each module go to buffers on it, since
    an index would be a constant of the compiled code.

    Args:
        layers: What is read; their modules keep the hooks and the buffers.
        forward: Runs the model once.
        rows: Tokens of a batch.
        device: Where the model runs.
        native: Call `plop_ext.ops.row_sumsq_` (sums of squares) instead of `torch.linalg.vector_norm` (norms).
    """

    def __init__(
        self,
        layers: Sequence[LinearLayer],
        forward: Callable[[], object],
        rows: int,
        device: torch.device,
        *,
        native: bool,
    ) -> None:
        modules = [layer.module for layer in layers]
        sources = _first_readers(modules, forward)
        self._native = native
        self._sums = torch.ones(2, len(modules), rows, device=device)
        self._source = torch.tensor(sources, device=device)
        self._totals = torch.zeros(len(modules), dtype=torch.float64, device=device)
        self._tokens = 0
        hook = _native_hook if native else _norm_hook
        for index, module in enumerate(modules):
            module.register_buffer("plop_output", self._sums[1, index], persistent=False)
            if sources[index] == index:
                module.register_buffer("plop_input", self._sums[0, index], persistent=False)
            module.register_forward_hook(hook)

    def end(self) -> None:
        """Close a forward."""
        inputs, outputs = self._sums
        gains = outputs / inputs[self._source]
        if self._native:
            gains = gains.sqrt()
        self._totals += gains.sum(dim=1, dtype=torch.float64)
        self._tokens += outputs.shape[1]

    def gains(self) -> list[float]:
        """Return the mean gain of each module."""
        return (self._totals / self._tokens).tolist()


def _first_readers(modules: Sequence[nn.Module], forward: Callable[[], object]) -> list[int]:
    """For each module the index of the first one that was called with the same input tensor."""
    sources, last = [0] * len(modules), [(None, -1)]  # type: list[int], list[tuple[Tensor | None, int]]

    def hook(index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args[0] is not last[0][0]:
            last[0] = (args[0], index)
        sources[index] = last[0][1]

    handles = [module.register_forward_hook(partial(hook, index)) for index, module in enumerate(modules)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return sources


def _norm_hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
    if hasattr(module, "plop_input"):
        module.plop_input.copy_(_norms(args[0]))
    module.plop_output.copy_(_norms(output))


def _native_hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
    if hasattr(module, "plop_input"):
        ops.row_sumsq_(module.plop_input, _rows(args[0]))
    ops.row_sumsq_(module.plop_output, _rows(output))


def _norms(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_rows(values), dim=-1, dtype=torch.float32)


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])
