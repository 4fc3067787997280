"""The errors of an op: one argument is changed, and the op, its fake and its PyTorch kernel must say the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from plop_ext import ops

F64 = torch.float64
Case = tuple[dict[str, Any], str]
Kernel = Callable[..., None]


def kernels_of(op: str) -> dict[str, Kernel]:
    return {"op": getattr(ops, op), "fake": getattr(ops, f"{op}fake"), "pytorch": getattr(ops, f"{op}pytorch")}


def check_errors(op: str, arguments: Mapping[str, Any], cases: Mapping[str, Case], device: torch.device) -> None:
    """Fails if any kernel says anything but the text of a case; names every such case and kernel.

    One test for all: there are 900 pairs of a case and a kernel, and pytest takes longer around a test than each.

    Args:
        op: Its name, as in `plop_ext.ops`.
        arguments: What the op accepts, by name.
        cases: Name to the changed arguments and the end of the error's line, which starts with the op's name.
        device: Where the tensors are moved.
    """
    wrong = []
    for case, (change, text) in cases.items():
        given = moved({**arguments, **change}, device)
        wrong += _complaints(case, op, given, re.escape(f"{op}: {text}"))
    assert not wrong, "\n".join(wrong)


def check_devices(
    op: str, arguments: Mapping[str, Any], names: Iterable[str], device: torch.device, other: str = "meta"
) -> None:
    """Fails if any kernel accepts one of the tensors in `names` on `other` beside the rest on `device`."""
    wrong = []
    for name in names:
        given = moved(arguments, device)
        given[name] = given[name].to(other)
        text = rf"{op}: {name} must be on {device.type}(:0)?, got {other}(:0)?"
        wrong += _complaints(f"{name} on {other}", op, given, text)
    assert not wrong, "\n".join(wrong)


def zeros(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(shape, **kwargs)


def moved(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors of the same strides and offsets on `device`, all zeros."""

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        room = value.untyped_storage().nbytes() // value.element_size()
        base = torch.zeros(room, dtype=value.dtype, device=device)
        return base.as_strided(value.shape, value.stride(), value.storage_offset())

    return {name: move(value) for name, value in arguments.items()}


def _complaints(case: str, op: str, arguments: dict[str, Any], pattern: str) -> list[str]:
    said = {name: _error(kernel, arguments) for name, kernel in kernels_of(op).items()}
    return [
        f"{case}: {name} said {text!r}, expected {pattern!r}"
        for name, text in said.items()
        if not re.search(f"{pattern}$", text, re.MULTILINE)
    ]


def _error(kernel: Kernel, arguments: dict[str, Any]) -> str:
    try:
        kernel(**arguments)
    except RuntimeError as error:
        return str(error)
    except Exception as error:
        return repr(error)
    return "nothing"
