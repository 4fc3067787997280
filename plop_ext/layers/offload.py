"""Weights that accelerate offloads: they are on the meta device outside of their module's forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def on_meta(module: nn.Module) -> bool:
    """Return whether one of the module's own weights is on the meta device, without values."""
    return any(weight.device.type == "meta" for weight in module.parameters(recurse=False))


def is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate puts the weights in place when the module is called."""
    hook: Any = getattr(module, "_hf_hook", None)
    return bool(getattr(hook, "offload", False))


@contextmanager
def weights_in_place(module: nn.Module) -> Iterator[None]:
    """Load the weights of an offloaded module to its execution device within the block."""
    if not (on_meta(module) and is_offloaded(module)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield
