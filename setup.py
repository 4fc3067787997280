"""Build of plop_ext: package metadata is in pyproject.toml, this file builds the native kernels with ninja.

Environment:
    PLOP_CUDA             auto (default): CUDA kernels where nvcc is found; 1: fail without nvcc; 0: CPU kernels only
    CUDA_HOME             the CUDA toolkit's folder; default: that of the nvcc on PATH, or /usr/local/cuda
    TORCH_CUDA_ARCH_LIST  as in torch ("8.0;9.0+PTX"); default: those of scripts/toolchain.py it knows, and PTX
    DEBUG                 1: warnings are errors, debug symbols
    MAX_JOBS              parallel compilations; default: ninja's own choice

Two files come out: `libplop_ext.so`, the kernels, which depends on the libtorch stable ABI (torch >= 2.10) and on no
Python version, and `_C`, a pybind11 module that loads it. Without torch, a C++ compiler, pybind11 or ninja the package
is built without either and runs on its PyTorch kernels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))  # build backends leave the project's own folder out

from toolchain import (  # noqa: E402
    HOPPER_OPS,
    arch_flags,
    find_nvcc,
    is_at_least,
    missing_tools,
    nvcc_release,
    source_flags,
)

VERSION = (ROOT / "plop_ext/_version.py").read_text().split('"')[-2]
TORCH_TARGET = "2.10"
TORCH_TARGET_VERSION = "0x020a000000000000"
OPS = ("row_sumsq", "gain_totals", "add_rms_norm", "gated_activation", "rotary")
KERNEL_SOURCES = tuple(f"{op}.cpp" for op in OPS + HOPPER_OPS) + tuple(f"cpu/{op}_cpu.cpp" for op in OPS)
CUDA_SOURCES = tuple(f"cuda/{op}_kernel.cu" for op in OPS + HOPPER_OPS)
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")


class BuildNative(build_ext):
    """Writes a build.ninja for the two libraries and runs it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace:  # or an editable install, whose own folder setuptools deletes: both reuse the same objects
            self.build_temp = str(ROOT / "build" / "inplace")

    def run(self) -> None:
        import ninja
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        package = ROOT / "plop_ext" if self.inplace else Path(self.build_lib).resolve() / "plop_ext"
        package.mkdir(parents=True, exist_ok=True)
        loader = package / Path(self.get_ext_filename("plop_ext._C")).name
        cxx = shutil.which(os.environ.get("CXX", "g++"))
        nvcc = find_nvcc()
        torch_lib = Path(torch.__file__).parent / "lib"

        common = f"-O{1 if DEBUG else 3} -std=c++17" + (" -g" if DEBUG else "")
        warnings = "-Wall -Wextra" + (" -Werror" if DEBUG else "")
        includes = " ".join(f"-isystem {path}" for path in include_paths())
        gencode, archs = arch_flags(nvcc) if nvcc else ([], "")
        cuda_version = nvcc_release(nvcc) if nvcc else ""
        facts = {
            "PLOP_VERSION": VERSION,
            "PLOP_CUDA_VERSION": cuda_version,
            "PLOP_CUDA_ARCHS": archs,
            "PLOP_TORCH_TARGET": TORCH_TARGET,
            "PLOP_BUILD_TORCH": torch.__version__,
        }
        defines = " ".join(f"""'-D{name}="{value}"'""" for name, value in facts.items())
        kernels = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}" + (" -DUSE_CUDA -DPLOP_WITH_CUDA" if nvcc else "")
        # A tenth of the size on disk; nvcc knows the flag since 12.8.
        smaller = "--compress-mode=size" if nvcc and is_at_least(cuda_version, (12, 8)) else ""
        deps = "-MMD -MF $out.d"
        depfile = "\n  depfile = $out.d\n  deps = gcc"
        # Products and sums round one by one, as separate PyTorch operators do, on every instruction set.
        rounding = "-ffp-contract=off"
        host = f"{common} {rounding} {warnings} -ffile-prefix-map={ROOT}/= -fPIC -fvisibility=hidden {deps}"
        device = f"{common} -lineinfo {smaller} -Xcompiler -fPIC,-fvisibility=hidden $gencode {deps}"
        python = f"-I{pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
        # libtorch.so must be NEEDED though no symbol of it is used: in CUDA builds of torch it alone pulls in
        # libtorch_cuda, where the weak stream symbol lives. nvcc links since it knows where its static runtime is.
        # A kernel that is missing is an error here and not where the library is loaded.
        flags = ("--no-as-needed", "--no-undefined")
        linker = f"{nvcc} -cudart static" if nvcc else str(cxx)
        linker += "".join(f" -Xlinker {flag}" for flag in flags)
        lines = [
            f"rule cxx\n  command = {cxx} {host} {kernels} {includes} -c $in -o $out{depfile}",
            f"rule nvcc\n  command = {nvcc} {device} -c $in -o $out{depfile}",
            f"rule link\n  command = {linker} -shared $in -o $out -L{torch_lib} -ltorch -ltorch_cpu -lc10",
            f"rule loader\n  command = {cxx} {host} {defines} -shared {python} $in -o $out -ldl{depfile}",
        ]
        objects = []
        for rule, sources in (("cxx", KERNEL_SOURCES), ("nvcc", CUDA_SOURCES if nvcc else ())):
            for source in sources:
                objects.append(build / (source.replace("/", "_") + ".o"))
                lines.append(f"build {objects[-1]}: {rule} {ROOT / 'csrc' / source}")
                if rule == "nvcc":
                    lines.append(f"  gencode = {' '.join(source_flags(source, gencode, cuda_version))}")
        library = build / "libplop_ext.so"
        lines.append(f"build {library}: link {' '.join(map(str, objects))}")
        lines.append(f"build {build / loader.name}: loader {ROOT / 'csrc/python/module.cpp'}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")

        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build, *jobs], check=True, stdout=sys.stderr)
        for built in (library, build / loader.name):
            staged = package / f".{built.name}.new"
            shutil.copy2(built, staged)
            os.replace(staged, package / built.name)  # a process that has the old file open keeps it whole

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "plop_ext"
        return [str(package / "libplop_ext.so"), str(package / Path(self.get_ext_filename("plop_ext._C")).name)]


missing = missing_tools()
if missing:
    find_nvcc()  # PLOP_CUDA=1 without nvcc is an error here too
    if os.environ.get("PLOP_CUDA") == "1":
        needed = f"missing {', '.join(missing)}"
        sys.exit(f"PLOP_CUDA=1 but the kernels cannot be built: {needed} (with pip, add --no-build-isolation)")
    print(f"plop_ext: building without native kernels, missing {', '.join(missing)}", file=sys.stderr)

setup(
    ext_modules=[] if missing else [Extension("plop_ext._C", ["csrc/python/module.cpp"])],
    cmdclass={} if missing else {"build_ext": BuildNative},
)
