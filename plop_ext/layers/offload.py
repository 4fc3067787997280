"""Weights that are in place only within their module's forward: offloaded, sharded, or computed by a hook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from plop_ext.layers.sharded import gathered, is_sharded


def on_meta(module: nn.Module) -> bool:
    """Return whether one of the module's own weights is on the meta device, without values."""
    return any(weight.device.type == "meta" for weight in module.parameters(recurse=False))


def is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate puts the weights in place when the module is called."""
    hook: Any = getattr(module, "_hf_hook", None)
    return bool(getattr(hook, "offload", False))


class Elsewhere:
    """Marks a module as accelerate marks an offloaded one: its weights are loaded when they are needed."""

    offload = True


@contextmanager
def weights_elsewhere(model: nn.Module) -> Iterator[None]:
    """Make weights on the meta device count as present within the block."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        module._hf_hook = Elsewhere
    try:
        yield
    finally:
        for module in modules:
            del module._hf_hook


@contextmanager
def weights_in_place(module: nn.Module) -> Iterator[None]:
    """Hold the weights as the forward has them within the block: on the execution device, whole, and computed.

    For a sharded module, this is a collective.
    """
    with _loaded(module), gathered(module) if is_sharded(module) else nullcontext(), _computed(module):
        yield


@contextmanager
def bias_in_place(module: nn.Module) -> Iterator[None]:
    """Hold the bias as the forward has it within the block, and the weight only if it costs no collective."""
    if is_sharded(module):
        with gathered(module, "bias"):
            yield
    else:
        with weights_in_place(module):
            yield


@contextmanager
def _loaded(module: nn.Module) -> Iterator[None]:
    """Load the weights of an offloaded module to its execution device within the block."""
    if not (on_meta(module) and is_offloaded(module)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


@contextmanager
def _computed(module: nn.Module) -> Iterator[None]:
    """Compute weights that the hooks of `torch.nn.utils.weight_norm` and `spectral_norm` set before each forward.

    Until then they are those of the last forward, or of the initialization, also after `load_state_dict`.
    """
    before = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            extra = (False,) if isinstance(hook, SpectralNorm) else ()  # no power iteration, as in eval mode
            before[hook.name] = getattr(module, hook.name)
            setattr(module, hook.name, hook.compute_weight(module, *extra))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
