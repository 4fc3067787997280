"""The replacement of a function of another package for a single thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class ThreadPatch:
    """A function of a module that a thread may replace; every other thread continues to call the original.

    While at least one thread has replaced it, the module holds a function that dispatches by thread.

    Args:
        name: Name of the function in its module.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._blocks = 0
        self._original: Callable[..., Any] | None = None
        # In some builds of Python, new threads would inherit a context variable.
        self._own = threading.local()

    @contextmanager
    def __call__(self, module: ModuleType, replacement: Callable[..., Any]) -> Iterator[None]:
        """Replace the function within the block, in the thread that entered it.

        Args:
            module: The module, the same at every call.
            replacement: The replacement.

        Raises:
            AttributeError: If the module has no such function.
        """
        with self._lock:
            found = getattr(module, self._name)
            if found != self._dispatch:  # other patches may have restored the function that they found during a block
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
