"""Calls an op with one argument changed and compares the text of its error."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

F64 = torch.float64


def zeros(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(shape, **kwargs)


def moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        room = value.untyped_storage().nbytes() // value.element_size()
        base = torch.zeros(room, dtype=value.dtype, device=device)
        return base.as_strided(value.shape, value.stride(), value.storage_offset())

    return {name: move(value) for name, value in arguments.items()}


def check(
    kernel: Callable[..., None],
    arguments: dict[str, Any],
    op: str,
    change: dict[str, Any],
    text: str,
    device: torch.device,
) -> None:
    arguments = moved({**arguments, **change}, device)
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: {text}") + r"\b|" + re.escape(f"{op}: {text}")) as error:
        kernel(**arguments)
    line = next(line for line in str(error.value).splitlines() if text in line)
    assert line.endswith(text) or "contiguous" in text, line
