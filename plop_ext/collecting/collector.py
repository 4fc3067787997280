"""Streams per-module feature norms out of forwards that run anyway."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plop_ext import ops
from plop_ext.collecting import routed_experts
from plop_ext.collecting.arena import Arena, Call, as_rows, shape_as_rows
from plop_ext.collecting.emitter import SILENT, BatchEmitter, Emitter, Parts
from plop_ext.collecting.token_map import BatchTokens, TokenMap
from plop_ext.collecting.transfer import to_device
from plop_ext.layers import LinearLayer, Unsupported, is_plain_product, weights_in_place
from plop_ext.totals import TOTALS_FIELDS

# The backward that this thread is in: gradient checkpointing repeats forwards there.
_current_backward = torch._C._current_graph_task_id
_NO_BACKWARD = -1


class Collector:
    """Context manager that hooks `layers` and turns each forward into per-(layer, sample) totals.

    Everything stays in buffers of the collector, nothing on the model; leaving the context removes every hook and
    gives fused experts their implementation back, also after an exception. The host never waits for a device before
    `totals`. Hooks run wherever the layers run; each device must use one stream during a batch. The second forward of
    a block under gradient checkpointing, in the backward, does not count.

    Args:
        model: The model the layers are part of. Compiled submodules run eagerly inside the context, because hooks
            added after compilation would not fire.
        layers: What to score (`plop_ext.layers.discover`); the parts of one module must be neighbours.
        last_call_only: Keep only the last call of a layer called several times in one forward, as the published script
            does. By default every call adds.

    Attributes:
        unmasked: Names of layers whose rows are not the tokens of the mask, so that all of them count.
        unassigned: Names of layers whose rows belong to no sample, with the reason.
        experts_implementation: How the model runs its fused experts outside of the context; None without any.

    Example:
        >>> with Collector(model, discover(model).layers) as collector:
        ...     for batch in dataloader:
        ...         collector.begin(batch_size=len(batch["input_ids"]), mask=batch["attention_mask"])
        ...         outputs = model(**batch)
        ...         collector.end()
        >>> totals = collector.totals()  # [layers, samples, 5] float64
    """

    def __init__(self, model: nn.Module, layers: Sequence[LinearLayer], *, last_call_only: bool = False) -> None:
        self.layers = tuple(layers)
        self.last_call_only = last_call_only
        self.unmasked: set[str] = set()
        self.unassigned: dict[str, str] = {}
        self.experts_implementation: str | None = None
        self._model = model
        self._parts: dict[nn.Module, list[tuple[int, LinearLayer]]] = {}
        for index, layer in enumerate(self.layers):
            self._parts.setdefault(layer.module, []).append((index, layer))
        self._stack = ExitStack()
        self._arenas: dict[tuple[torch.device, torch.dtype], Arena] = {}
        # Of the running batch.
        self._readings: dict[tuple[torch.Size, torch.Size, torch.device, torch.dtype], _Reading] = {}
        self._tokens: BatchTokens | None = None
        self._deferred: Collection[nn.Module] = ()
        self._finished: list[Tensor] = []
        self._transfers: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def __enter__(self) -> Collector:
        with ExitStack() as stack:
            for module in self._model.modules():
                for name, eager in _compiled_calls(module).items():
                    stack.callback(vars(module).__setitem__, name, vars(module)[name])
                    vars(module)[name] = eager
            experts = {}
            for module, parts in self._parts.items():
                if parts[0][1].adapter.routed:
                    experts[module] = _ExpertsObserver(self, module, parts)
                else:
                    hook = _Hook(self, module, parts)
                    # First of the module's hooks: one of the user's may replace the output.
                    handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
                    stack.callback(handle.remove)
            self.experts_implementation = stack.enter_context(routed_experts.observed(experts))
            stack.callback(self._arenas.clear)
            stack.callback(self._readings.clear)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def begin(self, batch_size: int, mask: Tensor | None = None, *, step: int = 1, phase: int = 0) -> None:
        """Announce the next forward.

        Args:
            batch_size: Samples in the batch.
            mask: [B, T] bool or 0/1, which tokens count; None counts all. A CPU mask costs no wait.
            step: Read every `step`-th token only.
            phase: The first token read, in [0, step).
        """
        self.begin_with(BatchTokens(batch_size, mask, step, phase))

    def begin_with(self, tokens: BatchTokens) -> None:
        """Announce the next forward, of a batch whose tokens are known already."""
        self._tokens = tokens
        self._readings.clear()
        for arena in self._arenas.values():
            arena.start_batch(tokens.batch_size)

    def end(self) -> None:
        """Close the forward announced last: reduce what is pending and send the totals on their way to the host."""
        self.send(self.close())

    def close(self) -> Tensor:
        """[M, B, 5] float64: totals of the forward announced last, on its device, for `send`."""
        assert self._tokens is not None, "begin() comes first"
        batch = [arena.finish_batch() for arena in self._arenas.values()]
        shape = (len(self.layers), self._tokens.batch_size, len(TOTALS_FIELDS))
        self._tokens = None
        self._readings.clear()
        merged = torch.zeros(shape, dtype=torch.float64) if not batch else batch[0]
        for other in batch[1:]:
            merged = merged + to_device(other, merged.device)
        return merged

    def send(self, totals: Tensor) -> None:
        """Send what `close` returned on its way to the host, as the totals of the next batch."""
        self._drain(wait=False)
        if totals.device.type == "cuda":
            host = torch.empty(totals.shape, dtype=torch.float64, pin_memory=True)
            host.copy_(totals, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(totals.device))
            self._transfers.append((host, event))
        else:
            self._transfers.append((totals.cpu(), None))

    @contextmanager
    def separate(self) -> Iterator[None]:
        """Within the block a forward reduces in buffers of its own, which no other forward reads or replaces."""
        arenas, self._arenas = self._arenas, {}
        try:
            yield
        finally:
            self._arenas, self._tokens = arenas, None
            self._readings.clear()

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

    @contextmanager
    def deferring(self, modules: Collection[nn.Module]) -> Iterator[None]:
        """Within the block the outputs of `modules` are left to fused kernels, which ask the `emitter` for them."""
        before, self._deferred = self._deferred, modules
        try:
            yield
        finally:
            self._deferred = before

    def emitter(self, x: Tensor) -> Emitter:
        """Where a kernel that passes over tensors with the rows of `x` [..., K] leaves their sums."""
        tokens = self.tokens
        token_map = None if tokens is None else tokens.map_for(x.shape[:-1].numel(), x.device)
        if tokens is None or token_map is None:
            return SILENT

        def parts(module: nn.Module) -> Parts:
            found = self._parts.get(module, ())
            if not token_map.masked:
                self.unmasked.update(layer.name for _, layer in found)
            return found

        return BatchEmitter(self.arena_for(x.device, x.dtype), token_map, parts)

    def bypassable(self, modules: Sequence[nn.Module], x: Tensor) -> bool:
        """Whether a kernel may stand for linear layers that read `x` [..., K], and take the sums of two outputs.

        Args:
            modules: Two layers, or one of two parts; what is scored of them has no other part.
            x: Their input.
        """
        if len(set(modules)) < len(modules):
            return False
        if any(not self.owns(hook) for module in modules for hook in module._forward_hooks.values()):
            return False
        tokens = self.tokens
        if tokens is None:
            return True
        parts = [layer for module in modules for _, layer in self._parts.get(module, ())]
        return (
            not self.last_call_only
            and not tokens.time_first(x.shape)
            and tokens.map_for(x.shape[:-1].numel(), x.device) is not None
            and all((layer.split is None) == (len(modules) == 2) for layer in parts)
            and all(is_plain_product(layer.adapter) for layer in parts)
        )

    def owns(self, hook: object) -> bool:
        """Whether a forward hook is one of this collector's."""
        return isinstance(hook, _Hook) and hook.collector is self

    def last_totals(self) -> Tensor:
        """[M, B, 5] float64 on the CPU: totals of the batch closed last. Waits for the devices."""
        self._drain(wait=True)
        return self._finished[-1]

    def drop_batch(self) -> None:
        """Forget the batch closed last."""
        self._drain(wait=True)
        self._finished.pop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block nothing counts; the running batch goes on after it."""
        tokens, self._tokens = self._tokens, None
        try:
            yield
        finally:
            self._tokens = tokens

    def observe(
        self,
        module: nn.Module,
        parts: Sequence[tuple[int, LinearLayer]],
        x: Tensor,
        x_sumsq: Tensor | None,
        y: Tensor,
        bias: Tensor | None,
    ) -> None:
        """Record one call of a module. Called by the hooks.

        Args:
            module: The module.
            parts: What is scored of it, with the rows of the totals.
            x: Its input [..., K].
            x_sumsq: [rows] sums of the vectors that W is applied to, where these are not the input's rows.
            y: Its output [..., M].
            bias: [M] or None, what was added to `y`.
        """
        key = (x.shape, y.shape, y.device, y.dtype)
        reading = self._readings.get(key) if x_sumsq is None else None
        if reading is None:
            reading = self._read(parts, x, x_sumsq, y)
            if reading is None:
                return
            if x_sumsq is None and reading.token_map.masked:  # else every module has to be noted
                self._readings[key] = reading
        token_map, arena, as_they_are, time_first = reading
        x_rows, y_rows = x, y
        if not as_they_are or x.requires_grad or y.requires_grad:
            x_rows, y_rows = x if x_sumsq is not None else as_rows(x), as_rows(y)
        if time_first:
            x_rows, y_rows = x_rows.transpose(0, 1), y_rows.transpose(0, 1)
        if self.last_call_only:
            for index, _ in parts:
                arena.forget(index)
        # A kernel sees rows in the order they have in memory.
        deferred = module in self._deferred and x_sumsq is None and y_rows.is_contiguous()
        arena.add(parts, Call(x, x_rows, x_sumsq, y_rows, bias), token_map, deferred)

    def _read(
        self, parts: Sequence[tuple[int, LinearLayer]], x: Tensor, x_sumsq: Tensor | None, y: Tensor
    ) -> _Reading | None:
        """How the call is read; None, and noted for `parts`, where it cannot be."""
        assert self._tokens is not None
        x_shape, y_shape = shape_as_rows(x.shape), shape_as_rows(y.shape)
        rows = y_shape[:-1].numel()
        inputs = x_shape[:-1].numel() if x_sumsq is None else len(x_sumsq)
        if inputs != rows:
            self.leave_out(parts, f"it maps {inputs} input rows to {rows} output rows")
            return None
        token_map = self.map_for(rows, y.device, parts)
        if token_map is None:
            return None
        time_first = x_sumsq is None and self._tokens.time_first(x_shape) and len(y_shape) == 3
        as_they_are = x_shape == x.shape and y_shape == y.shape
        return _Reading(token_map, self.arena_for(y.device, y.dtype), as_they_are, time_first)

    def leave_out(self, parts: Sequence[tuple[int, LinearLayer]], reason: str) -> None:
        """Note why a module's calls cannot be counted."""
        self.unassigned.update((layer.name, reason) for _, layer in parts)

    def map_for(self, rows: int, device: torch.device, parts: Sequence[tuple[int, LinearLayer]]) -> TokenMap | None:
        """The running batch's map of `rows` rows; None, and noted for `parts`, where they belong to no sample."""
        assert self._tokens is not None
        token_map = self._tokens.map_for(rows, device)
        if token_map is None:
            self.leave_out(parts, f"its {rows} input rows cannot be assigned to {self._tokens.batch_size} samples")
        elif not token_map.masked:
            self.unmasked.update(layer.name for _, layer in parts)
        return token_map

    def arena_for(self, device: torch.device, dtype: torch.dtype) -> Arena:
        """The running batch's arena for outputs of `dtype` on `device`."""
        assert self._tokens is not None
        key = (device, ops.sum_dtype(dtype))
        if key not in self._arenas:
            self._arenas[key] = Arena(*key, len(self.layers))
            self._arenas[key].start_batch(self._tokens.batch_size)
        return self._arenas[key]

    @property
    def tokens(self) -> BatchTokens | None:
        """The running batch; None where a forward does not count: nobody announced it, or it is a recomputation."""
        tokens = self._tokens
        return tokens if tokens is None or _current_backward() == _NO_BACKWARD else None

    def _drain(self, wait: bool) -> None:
        while self._transfers and (wait or self._transfers[0][1] is None or self._transfers[0][1].query()):
            self._receive()

    def _receive(self) -> None:
        host, event = self._transfers.pop(0)
        if event is not None:
            event.synchronize()
            host = host.clone()  # gives the pinned block back
        self._finished.append(host)


class _Reading(NamedTuple):
    """How the running batch reads calls with an input and an output of some shape, and of some type and device.

    Attributes:
        token_map: Their rows.
        arena: Where the sums go.
        as_they_are: Both have 2 or 3 dimensions.
        time_first: Inputs are [T, B, K], outputs alike.
    """

    token_map: TokenMap
    arena: Arena
    as_they_are: bool
    time_first: bool


class _Hook:
    """Forward hook of one module. Returns None: anything else would replace the module's output."""

    def __init__(self, collector: Collector, module: nn.Module, parts: list[tuple[int, LinearLayer]]) -> None:
        self.collector = collector
        self.parts = parts
        self.adapter = parts[0][1].adapter
        # Read now, not in the forward: accelerate's offload has taken it away again when the hook runs.
        with weights_in_place(module):
            bias = self.adapter.bias(module)
        self.bias = None if bias is None else bias.detach()
        self.biases: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        collector, adapter = self.collector, self.adapter
        if collector.tokens is None:
            return
        x = adapter.input(module, args, kwargs)
        try:
            y = adapter.output(module, adapter.base_output(module, x, output))
        except Unsupported as error:
            collector.leave_out(self.parts, str(error))
            return
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            reason = "its input or output is no tensor; see plop_ext.layers.register_adapter"
            collector.leave_out(self.parts, reason)
            return
        collector.observe(module, self.parts, x, adapter.input_sumsq(module, x), y, self._bias_of(y))

    def _bias_of(self, y: Tensor) -> Tensor | None:
        """What was added to `y`: autocast rounds a bias to the type it computes in before it adds it."""
        bias = self.bias
        if bias is None or (bias.dtype == y.dtype and bias.device == y.device):
            return bias
        key = (y.device, y.dtype)
        if key not in self.biases:
            self.biases[key] = bias.to(*key)
        return self.biases[key]


class _ExpertsObserver:
    """What a fused experts module asks at each call."""

    def __init__(self, collector: Collector, module: nn.Module, parts: list[tuple[int, LinearLayer]]) -> None:
        self.collector = collector
        self.experts = int(module.num_experts)  # type: ignore[arg-type]
        self.first_rows = routed_experts.first_rows(parts, module)
        self.parts = parts

    def __call__(self, hidden: Tensor, token: Tensor, expert: Tensor) -> routed_experts.RoutedCall | None:
        tokens = self.collector.tokens
        if tokens is None:
            return None
        rows = len(hidden)
        if self.collector.map_for(rows, hidden.device, self.parts) is None:
            return None
        samples, counted = tokens.samples(rows, hidden.device)
        arena = self.collector.arena_for(hidden.device, hidden.dtype)
        return routed_experts.RoutedCall(
            arena, self.first_rows, tokens, hidden, token, expert, self.experts, samples, counted
        )


def _compiled_calls(module: nn.Module) -> dict[str, Any]:
    """The module's attributes that hold a compiled call, and their eager values."""
    calls: dict[str, Any] = {"_compiled_call_impl": None}  # set by `module.compile()`
    inner = module._modules.get("_orig_mod")
    if inner is not None:  # what `torch.compile(module)` returned
        calls["forward"] = inner
    return {name: eager for name, eager in calls.items() if vars(module).get(name) is not None}
