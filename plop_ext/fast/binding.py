"""Forwards bound to instances, as `kernels.kernelize` binds those of the hub; classes are never touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Bindings:
    """Forwards to bind to modules while it is active."""

    def __init__(self) -> None:
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        self._active = False

    def add(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let `module(...)` run `forward(...)`, from now on if this is active."""
        self._forwards[module] = forward
        if self._active:
            vars(module)["forward"] = forward

    def activate(self) -> None:
        for module, forward in self._forwards.items():
            vars(module)["forward"] = forward
        self._active = True

    def deactivate(self) -> None:
        for module in self._forwards:
            vars(module).pop("forward", None)
        self._active = False

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within the block the modules run as they were."""
        assert self._active
        self.deactivate()
        try:
            yield
        finally:
            self.activate()
