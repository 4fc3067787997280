"""Streams per-module feature norms out of forwards that run anyway."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext import ops
from plop_ext.layers import LinearLayer
from plop_ext.scoring.token_map import BatchTokens, TokenMap
from plop_ext.scoring.transfer import to_device
from plop_ext.totals import TOTALS_FIELDS

# Sums of squares wait here for the reduction to totals. 4 MiB hold 128 vectors of 8192 tokens; more saves nothing,
# since a reduction costs a launch of some microseconds.
_ARENA_ELEMENTS = 1 << 20


class Collector:
    """Context manager that hooks `layers` and turns each forward into per-(module, sample) totals.

    Everything stays in buffers of the collector, nothing on the model; leaving the context removes every hook, also
    after an exception. The host never waits for a device before `totals`. Hooks run wherever the layers run; each
    device must use one stream during a batch.

    Args:
        model: The model the layers are part of. Compiled submodules run eagerly inside the context, because hooks
            added after compilation would not fire.
        layers: What to score (`plop_ext.layers.discover`).
        last_call_only: Keep only the last call of a layer called several times in one forward, as the published script
            does. By default every call adds.

    Example:
        >>> with Collector(model, discover(model).layers) as collector:
        ...     for batch in dataloader:
        ...         collector.begin(batch_size=len(batch["input_ids"]), mask=batch["attention_mask"])
        ...         outputs = model(**batch)
        ...         collector.end()
        >>> totals = collector.totals()  # [modules, samples, 5] float64
    """

    def __init__(self, model: nn.Module, layers: Sequence[LinearLayer], *, last_call_only: bool = False) -> None:
        self.layers = tuple(layers)
        self.last_call_only = last_call_only
        self.unmasked: set[str] = set()
        self.unassigned: dict[str, str] = {}
        self._model = model
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._compiled: list[tuple[nn.Module, str, Any]] = []
        self._arenas: dict[tuple[torch.device, torch.dtype], _Arena] = {}
        self._biases: dict[tuple[int, torch.dtype], Tensor | None] = {}
        self._tokens: BatchTokens | None = None
        self._finished: list[Tensor] = []
        self._transfers: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def __enter__(self) -> Collector:
        try:
            for module in self._model.modules():
                for name, eager in _compiled_calls(module).items():
                    self._compiled.append((module, name, vars(module)[name]))
                    vars(module)[name] = eager
            for index, layer in enumerate(self.layers):
                hook = _Hook(self, index, layer)
                # First of the module's hooks: one of the user's may replace the output.
                self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()

    def begin(self, batch_size: int, mask: Tensor | None = None, *, step: int = 1, phase: int = 0) -> None:
        """Announce the next forward.

        Args:
            batch_size: Samples in the batch.
            mask: [B, T] bool or 0/1, which tokens count; None counts all. A CPU mask costs no wait.
            step: Read every `step`-th token only.
            phase: The first token read, in [0, step).
        """
        self._tokens = BatchTokens(batch_size, mask, step, phase)
        for arena in self._arenas.values():
            arena.start_batch(batch_size)

    def end(self) -> None:
        """Close the forward announced last: reduce what is pending and send the totals on their way to the host."""
        assert self._tokens is not None, "begin() comes first"
        batch = [arena.finish_batch() for arena in self._arenas.values()]
        shape = (len(self.layers), self._tokens.batch_size, len(TOTALS_FIELDS))
        self._tokens = None
        self._drain(wait=False)
        merged = torch.zeros(shape, dtype=torch.float64) if not batch else batch[0]
        for other in batch[1:]:
            merged = merged + to_device(other, merged.device)
        if merged.device.type == "cuda":
            host = torch.empty(shape, dtype=torch.float64, pin_memory=True)
            host.copy_(merged, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(merged.device))
            self._transfers.append((host, event))
        else:
            self._transfers.append((merged.cpu(), None))

    def totals(self) -> Tensor:
        """[M, S, 5] float64 on the CPU: totals of all closed batches, samples as seen. Waits for the devices."""
        self._drain(wait=True)
        if not self._finished:
            return torch.zeros(len(self.layers), 0, len(TOTALS_FIELDS), dtype=torch.float64)
        return torch.cat(self._finished, dim=1)

    def batch_totals(self, batch: int) -> Tensor:
        """[M, B, 5] float64 on the CPU: totals of the `batch`-th closed batch, from 0. Waits for that one only."""
        while len(self._finished) <= batch:
            self._receive()
        return self._finished[batch]

    def observe(self, index: int, layer: LinearLayer, x: Tensor, y: Tensor) -> None:
        """Record one call of layer `index`: input [..., K], output [..., M]. Called by the hooks."""
        tokens = self._tokens
        if tokens is None:  # a forward nobody announced, for instance one the model runs to warm up
            return
        x_rows, y_rows = _as_rows(x), _as_rows(y)
        if tokens.time_first(x_rows.shape) and y_rows.dim() == 3:
            x_rows, y_rows = x_rows.transpose(0, 1), y_rows.transpose(0, 1)
        rows = x_rows.shape[:-1].numel()
        token_map = tokens.map_for(rows, y.device)
        if token_map is None or y_rows.shape[:-1].numel() != rows:
            self.unassigned[layer.name] = f"its {rows} input rows cannot be assigned to {tokens.batch_size} samples"
            return
        if not token_map.masked:
            self.unmasked.add(layer.name)
        sum_dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        arena = self._arenas.get((y.device, sum_dtype))
        if arena is None:
            arena = _Arena(y.device, sum_dtype, len(self.layers))
            arena.start_batch(tokens.batch_size)
            self._arenas[(y.device, sum_dtype)] = arena
        if (index, y.dtype) not in self._biases:
            bias = layer.adapter.bias(layer.module)
            if bias is not None and bias.dtype != y.dtype:
                # What was added: autocast rounds a bias to the type it computes in before it adds it.
                bias = bias.detach().to(y.dtype)
            self._biases[(index, y.dtype)] = bias
        arena.add(index, x, x_rows, y_rows, self._biases[(index, y.dtype)], token_map, tokens, self.last_call_only)

    def _drain(self, wait: bool) -> None:
        while self._transfers and (wait or self._transfers[0][1] is None or self._transfers[0][1].query()):
            self._receive()

    def _receive(self) -> None:
        host, event = self._transfers.pop(0)
        if event is not None:
            event.synchronize()
            host = host.clone()  # gives the pinned block back
        self._finished.append(host)

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        while self._compiled:
            module, name, compiled = self._compiled.pop()
            vars(module)[name] = compiled
        self._arenas.clear()
        self._biases.clear()


class _Hook:
    """Forward hook of one layer. Returns None: anything else would replace the layer's output."""

    __slots__ = ("collector", "index", "layer")

    def __init__(self, collector: Collector, index: int, layer: LinearLayer) -> None:
        self.collector = collector
        self.index = index
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        adapter = self.layer.adapter
        self.collector.observe(self.index, self.layer, adapter.input(args, kwargs), adapter.output(output))


class _Arena:
    """Sums of squares of one device that wait for their reduction, and the totals of the running batch."""

    def __init__(self, device: torch.device, dtype: torch.dtype, n_modules: int) -> None:
        self._device = device
        self._n_modules = n_modules
        self._sums = torch.empty(_ARENA_ELEMENTS, dtype=dtype, device=device)
        self._totals = torch.empty(0, device=device)
        self._used = 0
        self._records: list[int] = []
        self._modules: set[int] = set()
        self._map: TokenMap | None = None
        # Inputs already summed since the last reduction: q, k and v share one tensor, gate and up another. A weak
        # reference keeps no activation alive and cannot be fooled by an id that is used again.
        self._inputs: dict[int, tuple[weakref.ref[Tensor], int | None, int]] = {}

    def start_batch(self, batch_size: int) -> None:
        shape = (self._n_modules, batch_size, len(TOTALS_FIELDS))
        self._totals = torch.zeros(shape, dtype=torch.float64, device=self._device)
        self._reset()

    def finish_batch(self) -> Tensor:
        self._reduce()
        return self._totals

    def add(
        self,
        module: int,
        x: Tensor,
        x_rows: Tensor,
        y_rows: Tensor,
        bias: Tensor | None,
        token_map: TokenMap,
        tokens: BatchTokens,
        last_call_only: bool,
    ) -> None:
        """Sum input and output of one call of `module`."""
        rows = token_map.rows
        if module in self._modules:
            self._reduce()
        if self._map is not token_map or self._used + 2 * rows > self._sums.numel():
            self._reduce()
            self._map = token_map
            if 2 * rows > self._sums.numel():
                self._sums = torch.empty(2 * rows, dtype=self._sums.dtype, device=self._device)
        if last_call_only:
            self._totals[module].zero_()
        # An inference tensor counts no modifications, so that nothing tells whether its sums still hold.
        version = None if x.is_inference() else x._version
        cached = self._inputs.get(id(x))
        if cached is not None and version is not None and cached[0]() is x and cached[1] == version:
            in_start = cached[2]
        else:
            if x.device != self._device:  # accelerate's offload hands the hook the input before it was moved
                x_rows = to_device(x_rows, self._device)
            in_start = self._sum(x_rows, None, rows, tokens)
            self._inputs[id(x)] = (weakref.ref(x), version, in_start)
        out_start = self._sum(y_rows, bias, rows, tokens)
        self._records += (module, in_start, out_start)
        self._modules.add(module)

    def _sum(self, values: Tensor, bias: Tensor | None, rows: int, tokens: BatchTokens) -> int:
        start = self._used
        self._used += rows
        ops.row_sumsq_(self._sums[start : self._used], values, bias, tokens.step, tokens.phase)
        return start

    def _reduce(self) -> None:
        if self._records and self._map is not None:
            ops.gain_totals_(self._totals, self._sums, self._map.counted, self._map.offsets, self._records)
        self._reset()

    def _reset(self) -> None:
        self._used = 0
        self._records = []
        self._modules.clear()
        self._inputs.clear()
        self._map = None


def _compiled_calls(module: nn.Module) -> dict[str, Any]:
    """The module's attributes that hold a compiled call, and their eager values."""
    calls: dict[str, Any] = {"_compiled_call_impl": None}  # set by `module.compile()`
    inner = module._modules.get("_orig_mod")
    if inner is not None:  # what `torch.compile(module)` returned
        calls["forward"] = inner
    return {name: eager for name, eager in calls.items() if vars(module).get(name) is not None}


def _as_rows(x: Tensor) -> Tensor:
    """`x` as [T, K] or [N, T, K], without a copy wherever its strides allow."""
    x = x.detach()
    if x.dim() in (2, 3):
        return x
    if x.dim() == 1:
        return x.unsqueeze(0)
    return x.reshape(-1, *x.shape[-2:])
