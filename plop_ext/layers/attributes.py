"""Attributes of modules of any class, whose properties may raise."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from plop_ext.layers.adapter import Unsupported


def attribute(owner: object, name: str) -> Any:
    """Return an attribute of a module or a configuration; None if there is none, or if reading it raises."""
    try:
        return getattr(owner, name, None)
    except Exception:  # code of a class that this package does not know
        return None


def tensor(module: nn.Module, name: str) -> Tensor | None:
    """Return an attribute of a module that is a tensor with a shape; None if it is anything else."""
    found = attribute(module, name)
    return found if isinstance(found, Tensor) and not is_lazy(found) else None


def check_weight(module: nn.Module) -> None:
    """Raise `Unsupported` for a module without a weight, or with one that has no values and no shape yet."""
    if tensor(module, "weight") is not None:
        return
    if is_lazy(attribute(module, "weight")):
        raise Unsupported("its weight is created by its first forward; run one forward first")
    raise Unsupported("its weight is missing")
