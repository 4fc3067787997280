"""The hooks that a collector attaches to the modules of a model."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.collecting import routed_experts
from plop_ext.collecting.arena import Arena
from plop_ext.collecting.feeding import Fed
from plop_ext.collecting.notes import IndexedLayers
from plop_ext.collecting.recording import Recording
from plop_ext.collecting.running_batch import RunningBatch
from plop_ext.collecting.token_map import Reading
from plop_ext.layers import LayerAdapter, ProductAdapter, Unsupported, bias_in_place, weights_in_place


class Hook(Fed):
    """Forward hook of one module. The hook returns None, because any other value would replace the module's output.

    Args:
        recording: The recording to write to.
        module: The module.
        layers: The scored layers of the module, with their rows in the totals.
    """

    def __init__(self, recording: Recording, module: nn.Module, layers: IndexedLayers) -> None:
        super().__init__(layers[0][1].stream)
        self.recording = recording
        self._layers = layers
        self._adapter = layers[0][1].adapter
        # Read now, not in the forward: when the hook runs, accelerate's offload has already removed the bias.
        in_place = bias_in_place if type(self._adapter).bias is LayerAdapter.bias else weights_in_place
        with in_place(module):
            bias = self._adapter.bias(module)
            self._bias = None if bias is None else bias.detach().clone()
        self._cast_biases: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        batch, adapter = self.recording.batch, self._adapter
        if batch is None:
            return
        x = adapter.input(module, args, kwargs)
        try:
            y = adapter.output(module, adapter.base_output(module, x, output))
        except Unsupported as error:
            batch.notes.leave_out(self._layers, str(error))
            return
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            reason = "its input or output is no tensor; see plop_ext.layers.register_adapter"
            batch.notes.leave_out(self._layers, reason)
            return
        fed = self.fed
        if fed is None:
            fed = self.recording.feeding.ask(self, x)
        batch.observe(module, self._layers, x, adapter.input_sumsq(module, x), y, self._bias_of(y), fed)

    def _bias_of(self, y: Tensor) -> Tensor | None:
        """Return the bias as it was added to `y`: autocast rounds it to the type of the computation first."""
        bias = self._bias
        if bias is None or (bias.dtype == y.dtype and bias.device == y.device):
            return bias
        key = (y.device, y.dtype)
        if key not in self._cast_biases:
            self._cast_biases[key] = bias.to(*key)
        return self._cast_biases[key]


class ExpertsObserver:
    """Observer of an experts module, whose forward calls the observer; the module has no hook.

    Args:
        recording: The recording to write to.
        module: The module.
        layers: The scored layers of the module, with their rows in the totals.
    """

    def __init__(self, recording: Recording, module: nn.Module, layers: IndexedLayers) -> None:
        self._recording = recording
        self._experts = int(module.num_experts)  # type: ignore[arg-type]
        self._first_rows = routed_experts.first_rows(layers, module)
        self._layers = layers

    def __call__(self, hidden: Tensor, token: Tensor, expert: Tensor) -> routed_experts.RoutedCall | None:
        batch = self._recording.batch
        reading = Reading(self._layers[0][1].stream, len(hidden))
        if batch is None or batch.map_for(reading, hidden.device, self._layers) is None:
            return None
        return routed_experts.RoutedCall(
            self._arena(batch, hidden),
            self._first_rows,
            batch.tokens,
            reading,
            hidden,
            token,
            expert,
            self._experts,
            self._first_read(batch, expert),
        )

    def _first_read(self, batch: RunningBatch, expert: Tensor) -> int:
        return batch.tokens.phase

    def _arena(self, batch: RunningBatch, hidden: Tensor) -> Arena:
        return batch.arena_for(hidden.device, hidden.dtype)


class ProductHook(Fed):
    """Stands for the forward of a module: runs the module's own, and records the product that it computes.

    Args:
        recording: The recording to write to.
        module: The module.
        layers: The scored layers of the module, with their rows in the totals.
        adapter: Their adapter.
    """

    def __init__(
        self, recording: Recording, module: nn.Module, layers: IndexedLayers, adapter: ProductAdapter
    ) -> None:
        super().__init__(layers[0][1].stream)
        self._recording = recording
        self._module = module
        self._forward = module.forward
        self._layers = layers
        self._adapter = adapter
        self._untried = adapter.untried

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch, module, adapter = self._recording.batch, self._module, self._adapter
        if batch is None:
            return self._forward(*args, **kwargs)
        run = partial(self._forward, *args, **kwargs)
        result, product = adapter.observe(module, run, compare=self._untried)
        self._untried = False
        if isinstance(product, str):
            batch.notes.leave_out(self._layers, product)
            return result
        x = adapter.input(module, args, kwargs)
        fed = self.fed
        if fed is None:
            fed = self._recording.feeding.ask(self, x)
        rows, sumsq, y, bias = adapter.rows(product, x)
        batch.observe(module, self._layers, rows, sumsq, y, bias, fed)
        return result


def compiled_calls(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of the module that hold compiled code, or have to hide that of its class, made eager."""
    attributes = vars(module)
    # `torch.compile(module)`, `module.compile()` and `module.forward = torch.compile(module.forward)`
    calls = {name: eager for name, value in attributes.items() if (eager := _eager(value)) is not None}
    of_class = _eager(type(module).forward)  # `@torch.compile` on the method
    if of_class is not None and "forward" not in attributes:
        calls["forward"] = MethodType(of_class, module)
    return calls


def _eager(function: Any) -> Any:
    """Return the function that `torch.compile` compiled; None for any other value."""
    return getattr(function, "_torchdynamo_orig_callable", None) if callable(function) else None


def replace_attribute(stack: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of the module's instance until `stack` closes."""
    attributes = vars(module)
    if name in attributes:
        stack.callback(attributes.__setitem__, name, attributes[name])
    else:
        stack.callback(attributes.pop, name, None)
    attributes[name] = value
