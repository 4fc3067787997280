"""The device and the type of the weights, from arguments."""

from __future__ import annotations

import torch

from plop_ext.arguments import check_type
from plop_ext.errors import InputError, SetupError


def parse_device(device: str | torch.device | None) -> torch.device:
    """Return the device, by default CUDA if available, or raise an error that names it."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_type((str, torch.device), "the name of a device", device=device)
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"`device` {device!r} is no device; give cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise SetupError(
            f"`device` {device}: torch sees {torch.cuda.device_count()} CUDA devices; use another, or cpu"
        )
    return chosen


def parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return `"auto"` or the floating-point type of that name, or raise an error that names it."""
    check_type((str, torch.dtype), "auto, float32, bfloat16 or float16", dtype=dtype)
    chosen = dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if chosen != "auto" and not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
        raise InputError(f"`dtype` {dtype!r} is no floating-point type; give auto, float32, bfloat16 or float16")
    return chosen
