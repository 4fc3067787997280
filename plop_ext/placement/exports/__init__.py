"""The exports of placements to training stacks, one file each.

A stack is a module of this package with a `STACK`: what the stack's configuration can express, and how it is written.
The file's name, with dashes for underscores, is the stack's name in `Placement.export`. Nothing else lists it; a
leading underscore hides a module.
"""

from __future__ import annotations

import importlib
import pkgutil

from plop_ext._warnings import warn
from plop_ext.arguments import check_flags, check_type, shown
from plop_ext.errors import InputError
from plop_ext.placement.data import PlacementData
from plop_ext.placement.exports._plan import make_plan
from plop_ext.placement.exports._stack import Plan, Stack
from plop_ext.placement.exports._text import comment


def stacks() -> tuple[str, ...]:
    """Return the names of the stacks, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name.replace("_", "-") for name in found if not name.startswith("_")))


def stack_named(name: str) -> Stack:
    """Return what a stack's configuration can express, and how it is written.

    Raises:
        InputError: If there is no such stack.
    """
    check_type(str, f"one of {', '.join(stacks())}", stack=name)
    if name not in stacks():
        raise InputError(f"`stack` must be one of {', '.join(stacks())}, got {shown(name)}")
    stack: Stack = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").STACK
    return stack


def plan(
    placement: PlacementData,
    stack: str,
    *,
    r: int | None = None,
    lora_alpha: float | None = None,
    lossy: bool = False,
) -> Plan:
    """Return what an export writes, and what is lost; see `Placement.export`."""
    check_flags(lossy=lossy)
    found = stack_named(stack)
    made = make_plan(placement, found, r, lora_alpha)
    if made.losses and not lossy:
        raise InputError(
            f"`{placement.label}` cannot be exported to {found.title} exactly: {'; '.join(made.losses)}; set `lossy` "
            "to write the rest, or name another stack"
        )
    return made


def export(
    placement: PlacementData,
    stack: str,
    *,
    r: int | None = None,
    lora_alpha: float | None = None,
    lossy: bool = False,
) -> str:
    """Return a placement in the form of `stack`; see `Placement.export`."""
    made = plan(placement, stack, r=r, lora_alpha=lora_alpha, lossy=lossy)
    for line in (*made.losses, *made.remarks):
        warn(line)
    return written(made)


def written(made: Plan) -> str:
    """Return the text of an export: comments that say what it is and what is lost, and the stack's configuration."""
    stack = made.stack
    count = f"{made.placed} module{'s' if made.placed > 1 else ''}"
    head = [
        f"LoRA placement {made.label} of {made.model}, {count}, for {stack.title} {stack.release}.",
        *(line for line in (stack.use, stack.caution) if line),
        *(f"Not as placed: {line}" for line in made.losses),
        *(f"Note: {line}" for line in made.remarks),
    ]
    return comment(head) + stack.write(made)
