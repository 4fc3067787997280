"""Forwards bound to instances, as `kernels.kernelize` binds those of the hub; classes are never touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Bindings:
    """Forwards to bind to modules while it is active; only modules that have none of their own."""

    def __init__(self) -> None:
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}

    def add(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let `module(...)` run `forward(...)` while this is active, instead of what was added before."""
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
        """Within the block the modules run as they were."""
        unbound = self._unbind()
        try:
            yield
        finally:
            for module in unbound:
                vars(module)["forward"] = self._forwards[module]

    def _unbind(self) -> list[nn.Module]:
        """Take the forwards back, but not what someone else has put in their place since."""
        bound = [module for module, forward in self._forwards.items() if vars(module).get("forward") == forward]
        for module in bound:
            del vars(module)["forward"]
        return bound
