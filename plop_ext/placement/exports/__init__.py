"""The exports of placements to training stacks, one file each.

A stack is a module of this package with a function `export(placement, **options)`. Its file's name, with dashes for
underscores, is the stack's name in `Placement.export`. Nothing else lists it; a leading underscore hides a module.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from plop_ext.arguments import check_type, shown
from plop_ext.errors import InputError
from plop_ext.placement.data import PlacementData


def stacks() -> tuple[str, ...]:
    """Return the names of the stacks, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name.replace("_", "-") for name in found if not name.startswith("_")))


def export(placement: PlacementData, stack: str, **options: Any) -> Any:
    """Return a placement in the form of `stack`; see `Placement.export`."""
    check_type(str, f"one of {', '.join(stacks())}", stack=stack)
    if stack not in stacks():
        raise InputError(f"`stack` must be one of {', '.join(stacks())}, got {shown(stack)}")
    return importlib.import_module(f"{__name__}.{stack.replace('-', '_')}").export(placement, **options)
