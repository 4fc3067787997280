"""Forwards bound to instances, as `kernels.kernelize` binds kernels of the hub; classes are never changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from plop_ext.forwards.fast.slots import replacement_of, slot_of


class Bindings:
    """Forwards that are bound to modules while active; the modules must not have a forward of their own."""

    def __init__(self) -> None:
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        # What the slots of the active forwards held before; None if they were empty.
        self._before: dict[nn.Module, Any] = {}

    def add(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Make `module(...)` run `forward(...)` while active, in place of a forward added before."""
        known = self._forwards.get(module)
        self._forwards[module] = forward
        if known is not None and replacement_of(module) == known:
            vars(module)[slot_of(module)] = forward

    def activate(self) -> None:
        for module in self._forwards:
            self._bind(module)

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
                self._bind(module)

    def _bind(self, module: nn.Module) -> None:
        slot = slot_of(module)
        self._before[module] = vars(module).get(slot)
        vars(module)[slot] = self._forwards[module]

    def _unbind(self) -> list[nn.Module]:
        """Unbind the forwards, except where other code has replaced them since."""
        bound = [module for module, forward in self._forwards.items() if replacement_of(module) == forward]
        for module in bound:
            slot, before = slot_of(module), self._before.pop(module)
            if before is None:
                del vars(module)[slot]
            else:
                vars(module)[slot] = before
        return bound
