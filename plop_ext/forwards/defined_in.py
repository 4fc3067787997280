"""The test whether a function is a package's own, or a replacement."""

from __future__ import annotations

import os
import sys
from typing import Any


def is_defined_in(function: Any, package: str) -> bool:
    """Return whether a function, and every function that it wraps, is defined in an imported package."""
    home = os.path.join(os.path.dirname(sys.modules[package].__file__ or ""), "")
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(home):
            return False
        function = getattr(function, "__wrapped__", None)
    return True
