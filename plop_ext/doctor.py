"""Report which kernels and packages this installation can use, and how to get those that it lacks."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from plop_ext import ops
from plop_ext._version import __version__
from plop_ext.ops import native
from plop_ext.totals import TOTALS_FIELDS, Totals

_PACKAGES = ("transformers", "peft", "accelerate", "datasets", "safetensors", "rich", "matplotlib")


@dataclass(frozen=True)
class Finding:
    """One line of the report: the subject, its value, and whether it is as expected."""

    what: str
    value: str
    good: bool = True


def examine() -> list[Finding]:
    """Check versions, kernels and devices, and run both ops on every device."""
    info = native.build_info()
    findings = [
        Finding("plop_ext", f"{__version__}, Python {platform.python_version()}, {platform.machine()}"),
        Finding("torch", f"{torch.__version__}, {_accelerator()}"),
        *(_package(name) for name in _PACKAGES),
    ]
    if info:
        cuda = f"CUDA {info['cuda']} for {info['cuda_archs']}" if info["cuda"] else "no CUDA kernels"
        findings.append(Finding("native build", f"{cuda}; gcc {info['compiler']}, torch >= {info['torch_target']}"))
    findings.append(Finding("kernels", ops.STATUS.reason, good=ops.STATUS.loaded))
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return findings + [_try(device) for device in devices]


def _accelerator() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda or 'none (CPU build)'}"


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, f"not installed: pip install {name}", good=False)


def _try(device: str) -> Finding:
    """Run the ops on a small input and compare with float64."""
    backend = ops.STATUS.backend(device)
    name = f" ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else ""
    try:
        values = torch.linspace(-2, 2, 7 * 129, device=device).reshape(7, 129)
        sums = torch.empty(14, device=device)
        ops.row_sumsq_(sums[:7], values)
        ops.row_sumsq_(sums[7:], 2 * values)
        totals = torch.zeros(1, 1, len(TOTALS_FIELDS), dtype=torch.float64, device=device)
        counted = torch.ones(7, dtype=torch.bool, device=device)
        ops.gain_totals_(totals, sums, counted, torch.tensor([0, 7], device=device), [0, 0, 7])
        found = Totals(totals.cpu().numpy()).sum_samples()
        right = abs(float(found.sum_gain[0]) - 14.0) < 1e-4 and float(found.tokens[0]) == 7.0
    except RuntimeError as error:
        return Finding(device, f"{backend}{name} fails: {str(error).splitlines()[0]}", good=False)
    return Finding(device, f"{backend}{name}, checked" if right else f"{backend}{name} gives wrong sums", good=right)
