"""Restore a model and the random state after they were changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_HALF = (torch.bfloat16, torch.float16)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode without gradients within the block, and restore the modes after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def random_state() -> Iterator[None]:
    """Restore the random generators of Python, NumPy and torch, on every device, after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


class Snapshot:
    """The state that adapters and a trainer change in a model: its tree of modules, flags, hooks, types and values.

    The tree is restored from a record, not by PEFT's `unload`, because an adapter whose injection fails halfway leaves
    no object with that method. Values are copied only for buffers and for the weights that are trainable at the time
    of `protect`; the rest of the model is frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._model: Any = model
        self._attributes = set(vars(model))
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        self._training = [(module, module.training) for module in modules]
        self._children = [(module, dict(module._modules)) for module in modules]
        self._hooks = [
            (hooks, set(hooks)) for module in modules for name in _HOOKS for hooks in [getattr(module, name)]
        ]
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._parameters = [(weight, weight.requires_grad, weight.grad, weight.data) for weight in model.parameters()]
        self._values: list[tuple[nn.Parameter, Tensor]] = []

    def widen(self) -> None:
        """Convert half-precision weights and buffers to float32 until the model is restored."""
        for weight, *_ in self._parameters:
            if weight.dtype in _HALF:
                weight.data = weight.data.float()
        for module, name, buffer, _ in self._buffers:
            if buffer.dtype in _HALF:
                module._buffers[name] = buffer.float()

    def protect(self) -> None:
        """Copy the weights of the model itself that are now trainable, such as biases beside an adapter."""
        self._values = [(weight, data.clone()) for weight, _, _, data in self._parameters if weight.requires_grad]

    def restore_types(self) -> None:
        """Restore the types of weights and buffers, but keep the trained values."""
        for weight, _, _, data in self._parameters:
            weight.data = weight.data.to(data.dtype) if weight.requires_grad else data
        self._restore_buffers()

    def restore(self) -> None:
        """Restore everything."""
        for module, children in self._children:
            module._modules.clear()
            module._modules.update(children)
        for module, training in self._training:
            module.training = training
        for hooks, known in self._hooks:
            for key in [key for key in hooks if key not in known]:
                del hooks[key]
        for weight, requires_grad, grad, data in self._parameters:
            weight.data = data
            weight.requires_grad_(requires_grad)
            weight.grad = grad
        for weight, value in self._values:
            weight.data.copy_(value)
        self._restore_buffers()
        for name in set(vars(self._model)) - self._attributes:
            delattr(self._model, name)
        self.restore_config()

    def restore_config(self) -> None:
        """Restore the cache setting of the model's configuration, which a trainer turns off."""
        if self._use_cache is not None:
            self._model.config.use_cache = self._use_cache

    def _restore_buffers(self) -> None:
        for module, name, buffer, value in self._buffers:
            module._buffers[name] = buffer
            buffer.copy_(value)
