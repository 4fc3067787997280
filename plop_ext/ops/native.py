"""The loader of the native kernels, and the status that names the kernels in use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plop_ext._warnings import warn

LIBRARY = Path(__file__).resolve().parent.parent / "libplop_ext.so"
# Why a build made no library: `setup.py` writes it beside the place of the library.
REASON = "without_kernels.txt"


@dataclass(frozen=True)
class Status:
    """Which kernels serve the ops in this process.

    Attributes:
        loaded: Whether the native library is loaded. Without it the PyTorch kernels in `plop_ext.ops` run.
        cuda: Whether CUDA tensors are served by the native CUDA kernels: the library has them and torch has CUDA.
        reason: The reason, in one sentence.
    """

    loaded: bool
    cuda: bool
    reason: str

    def backend(self, device: torch.device | str) -> str:
        """Return `"native-cuda"`, `"native-cpu"` or `"pytorch"`, for tensors on `device`."""
        kind = torch.device(device).type
        if kind == "cuda" and self.cuda:
            return "native-cuda"
        if kind == "cpu" and self.loaded:
            return "native-cpu"
        return "pytorch"


def load() -> Status:
    """Load the kernel library once the op schemas are defined. Never raises: a failure is a warning and a `Status`."""
    if os.environ.get("PLOP_PURE_PYTHON", "0") not in ("", "0"):
        return Status(False, False, "PLOP_PURE_PYTHON is set")
    if not LIBRARY.exists():
        return _without(f"this installation was built without native kernels ({_why_not_built()})")
    if torch.version.hip is not None and build_info().get("cuda", "not known") is not None:
        # ROCm's tensors have the dispatch key of CUDA's: the CUDA kernels would be launched on them.
        return _without("this torch is built for ROCm, and the native kernels for CUDA; build them with PLOP_CUDA=0")
    try:
        _open(LIBRARY)
    except (ImportError, OSError) as error:
        return _without(f"the native kernels do not load: {error}")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("plop_ext::row_sumsq_", "CUDA"):
        return Status(True, False, "the native kernels were built without CUDA (no nvcc, or PLOP_CUDA=0)")
    if not torch.backends.cuda.is_built():
        return Status(True, False, "this torch is a CPU build; the CUDA kernels are there but not used")
    if not torch.cuda.is_available():
        return Status(True, False, "torch sees no CUDA device; the CUDA kernels are there but not used")
    return Status(True, True, "native CPU and CUDA kernels are loaded")


def build_info() -> dict[str, Any]:
    """Return the versions, CUDA architectures and compiler of the native build; empty without one."""
    try:
        from plop_ext import _C
    except ImportError:
        return {}
    return dict(_C.build_info())


def _open(path: Path) -> None:
    try:
        from plop_ext import _C
    except ImportError:
        # `_C` needs the Python version of the build; the kernels load under any version.
        torch.ops.load_library(str(path))
    else:
        _C.load(str(path))


def _why_not_built() -> str:
    try:
        reason = LIBRARY.with_name(REASON).read_text(encoding="utf-8").strip()
    except OSError:
        reason = ""
    return reason or "a C++ compiler and --no-build-isolation are needed"


def _without(reason: str) -> Status:
    warn(f"plop_ext runs on its slower PyTorch kernels: {reason}; see `plop doctor`")
    return Status(False, False, reason)
