"""Functions of other packages, replaced for the running thread alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class ThreadPatch:
    """A function of a module that a thread may replace by its own; every other thread goes on calling the original.

    While at least one thread has replaced it the module holds a function that tells threads apart.

    Args:
        name: The name of the function in its module.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._blocks = 0
        self._original: Callable[..., Any] | None = None
        # A variable of the context would be inherited by new threads in some builds of Python.
        self._own = threading.local()

    @contextmanager
    def __call__(self, module: ModuleType, replacement: Callable[..., Any]) -> Iterator[None]:
        """Replace the function within the block, in the thread that entered it.

        Args:
            module: The same one at every call.
            replacement: Called in its place.

        Raises:
            AttributeError: If the module has no such function.
        """
        with self._lock:
            found = getattr(module, self._name)
            if found != self._dispatch:  # whoever else patches may have put back what it found during a block
                self._original = found
            setattr(module, self._name, self._dispatch)
            self._blocks += 1
        before = getattr(self._own, "replacement", None)
        self._own.replacement = replacement
        try:
            yield
        finally:
            self._own.replacement = before
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0 and getattr(module, self._name) == self._dispatch:
                    setattr(module, self._name, self._original)

    def _dispatch(self, *args: Any, **kwargs: Any) -> Any:
        function = getattr(self._own, "replacement", None) or self._original
        assert function is not None
        return function(*args, **kwargs)
