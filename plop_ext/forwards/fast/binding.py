"""Forwards bound to instances, as `kernels.kernelize` binds kernels of the hub; classes are never changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Bindings:
    """Forwards that are bound to modules while active; the modules must not have a forward of their own."""

    def __init__(self) -> None:
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}

    def add(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Make `module(...)` run `forward(...)` while active, in place of a forward added before."""
        before = self._forwards.get(module)
        self._forwards[module] = forward
        if before is not None and vars(module).get("forward") == before:
            vars(module)["forward"] = forward

    def activate(self) -> None:
        for module, forward in self._forwards.items():
            vars(module)["forward"] = forward

    def deactivate(self) -> None:
        self._unbind()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Unbind the forwards within the block, so that the modules run without the kernels."""
        unbound = self._unbind()
        try:
            yield
        finally:
            for module in unbound:
                vars(module)["forward"] = self._forwards[module]

    def _unbind(self) -> list[nn.Module]:
        """Unbind the forwards, except where other code has replaced them since."""
        bound = [module for module, forward in self._forwards.items() if vars(module).get("forward") == forward]
        for module in bound:
            del vars(module)["forward"]
        return bound
