"""Whose code a function is: that of a package, or what somebody has put in its place."""

from __future__ import annotations

import os
import sys
from typing import Any


def is_code_of(function: Any, package: str) -> bool:
    """Whether a function, and every function it wraps, is written in an imported package."""
    home = os.path.join(os.path.dirname(sys.modules[package].__file__ or ""), "")
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(home):
            return False
        function = getattr(function, "__wrapped__", None)
    return True
