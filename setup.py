"""Build of plop_ext: package metadata is in pyproject.toml, this file builds the native kernels with ninja.

Environment:
    PLOP_CUDA             auto (default): CUDA kernels where nvcc is found; 1: fail without them; 0: CPU kernels only
    CUDA_HOME             the CUDA toolkit's folder; default: that of the nvcc on PATH, or /usr/local/cuda
    TORCH_CUDA_ARCH_LIST  as in torch ("8.0;9.0+PTX"); default: those of scripts/toolchain.py it knows, and PTX
    DEBUG                 1: warnings are errors, debug symbols; fail if the kernels do not compile
    MAX_JOBS              parallel compilations; default: ninja's own choice

Two files come out: `libplop_ext.so`, the kernels, which depends on the libtorch stable ABI (torch >= 2.10) and on no
Python version, and `_C`, a pybind11 module that loads it. Where they cannot be built, because a tool is missing or a
step fails, the package is installed without them: it runs on its PyTorch kernels, and `plop doctor` gives the reason.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))  # build backends leave the project's own folder out

from native_build import BuildFailed, Kernels, compile_kernels  # noqa: E402
from toolchain import find_nvcc, missing_tools  # noqa: E402

# Read by `plop_ext.ops.native`.
REASON = "without_kernels.txt"


def insists() -> bool:
    """Return whether a build without native kernels is an error."""
    return os.environ.get("PLOP_CUDA") == "1" or os.environ.get("DEBUG", "0") not in ("", "0")


class BuildNative(build_ext):
    """Builds the two libraries, or records why the package has none."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace:  # or an editable install, whose own folder setuptools deletes: both reuse the same objects
            self.build_temp = str(ROOT / "build" / "inplace")

    def run(self) -> None:
        package = ROOT / "plop_ext" if self.inplace else Path(self.build_lib).resolve() / "plop_ext"
        package.mkdir(parents=True, exist_ok=True)
        loader = Path(self.get_ext_filename("plop_ext._C")).name
        nvcc = find_nvcc()
        try:
            built = self._build(loader, nvcc)
        except BuildFailed as failure:
            if insists():
                sys.exit(f"plop_ext: {failure}")
            for old in (package / "libplop_ext.so", package / loader):
                old.unlink(missing_ok=True)  # kernels of other sources than those that failed
            _record(package, str(failure))
            return
        for path in built:
            staged = package / f".{path.name}.new"
            shutil.copy2(path, staged)
            os.replace(staged, package / path.name)  # a process that has the old file open keeps it whole
        (package / REASON).unlink(missing_ok=True)

    def _build(self, loader: str, nvcc: Path | None) -> list[Path]:
        """Return the libraries; without CUDA kernels if these alone fail and need not be there."""
        build = Path(self.build_temp).resolve()
        verbose = bool(self.verbose)
        try:
            return compile_kernels(Kernels(ROOT, build, loader, nvcc), verbose)
        except BuildFailed as failure:
            if nvcc is None or insists():
                raise
            print(f"plop_ext: building without CUDA kernels: {failure}", file=sys.stderr)
            return compile_kernels(Kernels(ROOT, build, loader, None), verbose)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "plop_ext"
        names = ("libplop_ext.so", Path(self.get_ext_filename("plop_ext._C")).name, REASON)
        return [str(package / name) for name in names if (package / name).exists()]


class BuildWithout(build_py):
    """Builds a package without native code, which records why."""

    def run(self) -> None:
        super().run()
        package = ROOT / "plop_ext" if self.editable_mode else Path(self.build_lib).resolve() / "plop_ext"
        _record(package, f"missing {', '.join(missing)}")


def _record(package: Path, reason: str) -> None:
    """Say in one line why there are no native kernels, and keep it for `plop doctor`."""
    print(f"plop_ext: building without native kernels, {reason}", file=sys.stderr)
    (package / REASON).write_text(reason + "\n", encoding="utf-8")


missing = missing_tools()
if missing:
    find_nvcc()  # PLOP_CUDA=1 without nvcc is an error here too
    if os.environ.get("PLOP_CUDA") == "1":
        needed = f"missing {', '.join(missing)}"
        sys.exit(f"PLOP_CUDA=1 but the kernels cannot be built: {needed} (with pip, add --no-build-isolation)")

setup(
    ext_modules=[] if missing else [Extension("plop_ext._C", ["csrc/python/module.cpp"])],
    cmdclass={"build_py": BuildWithout} if missing else {"build_ext": BuildNative},
)
