"""What the kernels are built with: which tools are here, which are missing, and nvcc's architectures."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

DEFAULT_ARCHS = ("80", "86", "89", "90", "100", "120")
HOPPER_OPS = ("gated_projection",)  # their kernels are of Hopper's own instructions, and there are none for the CPU
HOPPER_RELEASE = (12, 5)  # of nvcc, whose runtime finds the driver's functions by version
HOPPER_FLAGS = ["-gencode=arch=compute_90a,code=sm_90a", "-DPLOP_SM90A"]


def find_nvcc() -> Path | None:
    """Return the nvcc to use, or None: PLOP_CUDA=0, none found, or a torch for ROCm."""
    wish = os.environ.get("PLOP_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"PLOP_CUDA must be 0, 1 or auto, got {wish!r}")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    places = [str(Path(home) / "bin")] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = next((path for place in places if (path := shutil.which("nvcc", path=place))), None)
    if found is None and wish == "1":
        where = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
        sys.exit(f"PLOP_CUDA=1 but there is no nvcc {where}: install the CUDA toolkit, or set PLOP_CUDA=0")
    if found is not None and _torch_is_for_rocm():
        if wish == "1":
            sys.exit("PLOP_CUDA=1 but this torch is built for ROCm: install a torch for CUDA, or set PLOP_CUDA=0")
        return None
    return Path(found).resolve() if found else None


def _torch_is_for_rocm() -> bool:
    """Return whether the installed torch runs on ROCm, whose tensors must not reach CUDA kernels."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")  # quicker to read than torch is to import
    return bool(re.search(r"^hip\b.*=\s*['\"]", version.read_text(), re.MULTILINE)) if version.exists() else False


def missing_tools() -> list[str]:
    """Return what keeps the native kernels from being built here."""
    missing = [name for name in ("torch", "pybind11", "ninja") if importlib.util.find_spec(name) is None]
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        missing.append("a C++ compiler (g++, or the one named by CXX)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("the Python headers")
    return missing


def arch_flags(nvcc: Path) -> tuple[list[str], str]:
    """nvcc's flags for the architectures, and the readable list they stand for."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wish:
        names = [name for name in re.split(r"[;\s]+", wish.strip()) if name]
        archs = [re.sub(r"\+PTX$", "", name).replace(".", "") for name in names]
        ptx = [arch for name, arch in zip(names, archs, strict=True) if name.endswith("+PTX")]
    else:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        archs = [arch for arch in DEFAULT_ARCHS if f"compute_{arch}" in listed.split()]
        ptx = archs[-1:]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ptx]
    if any(int(re.sub(r"\D", "", arch)) < 90 for arch in ptx):
        flags.append("-DPLOP_LAUNCHES_IN_ORDER")
    return flags, " ".join([f"sm_{arch}" for arch in archs] + [f"compute_{arch}" for arch in ptx])


def nvcc_release(nvcc: Path) -> str:
    """As in "13.0"."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split("release ")[1].split(",")[0]


def is_at_least(release: str, wanted: tuple[int, int]) -> bool:
    return tuple(map(int, release.split("."))) >= wanted


def source_flags(source: str, flags: list[str], release: str) -> list[str]:
    """Return the `arch_flags` for one source: a kernel of `HOPPER_OPS` is built for that architecture only.

    Built without Hopper, or by an nvcc `release` that is too old for them, there are none.
    """
    if not any(f"{op}_kernel" in source for op in HOPPER_OPS):
        return flags
    if not is_at_least(release, HOPPER_RELEASE) or not any("code=sm_90" in flag for flag in flags):
        return flags[:1]
    return HOPPER_FLAGS + [flag for flag in flags if flag.startswith("-D")]
