"""Where a forward is bound to a module: on the instance, or inside the one by which accelerate moves its inputs."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

_OWN, _INSIDE = "forward", "_old_forward"


def slot_of(module: nn.Module) -> str:
    """Return the attribute of the instance that holds the forward that a call of the module ends in.

    Under a `device_map`, accelerate replaces the forward of each module by one that moves the inputs to the module's
    device, and calls the attribute `_old_forward`.
    """
    return _INSIDE if _INSIDE in vars(module) and _only_moves_inputs(module) else _OWN


def replacement_of(module: nn.Module) -> Any:
    """Return the forward on the instance that replaces that of the class; None if there is none."""
    if slot_of(module) == _OWN:
        return vars(module).get(_OWN)
    inside = vars(module)[_INSIDE]
    return None if getattr(inside, "__func__", None) is type(module).forward else inside


def _only_moves_inputs(module: nn.Module) -> bool:
    """Return whether accelerate has replaced the forward, and leaves the weights in their place."""
    hooks = sys.modules.get("accelerate.hooks")
    forward = vars(module).get(_OWN)
    if hooks is None or not isinstance(forward, functools.partial) or forward.func.__module__ != hooks.__name__:
        return False
    hook: Any = getattr(module, "_hf_hook", None)
    return type(hook) is hooks.AlignDevicesHook and not hook.offload
