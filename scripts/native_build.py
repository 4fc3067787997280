"""The native build: a build.ninja for the two libraries, run with a line per step, and failures in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from toolchain import HOPPER_OPS, arch_flags, is_at_least, nvcc_release, source_flags

TORCH_TARGET = "2.10"
TORCH_TARGET_VERSION = "0x020a000000000000"
OPS = ("row_sumsq", "gain_totals", "add_rms_norm", "gated_activation", "rotary")
KERNEL_SOURCES = tuple(f"{op}.cpp" for op in OPS + HOPPER_OPS) + tuple(f"cpu/{op}_cpu.cpp" for op in OPS)
CUDA_SOURCES = tuple(f"cuda/{op}_kernel.cu" for op in OPS + HOPPER_OPS)
LOG = "build.log"
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")
# What compilers and linkers begin a line with that says why they stop.
_ERROR = re.compile(r"\b(fatal error|error)\b:? (.+)|^(?:\S*/)?(ld|collect2|clang)\b[^:]*: (.+)", re.IGNORECASE)


class BuildFailed(Exception):
    """A native build that fails; the text gives the reason in one line."""


@dataclass(frozen=True)
class Kernels:
    """What to build.

    Attributes:
        root: Folder of the project.
        build: Folder of the objects, the log and the two libraries.
        loader: Name of the pybind11 module's file.
        nvcc: The CUDA compiler, or None for CPU kernels alone.
    """

    root: Path
    build: Path
    loader: str
    nvcc: Path | None


def compile_kernels(kernels: Kernels, verbose: bool) -> list[Path]:
    """Build the two libraries.

    Args:
        kernels: What to build.
        verbose: Print a line per step to stderr.

    Returns:
        The kernel library and the module that loads it.

    Raises:
        BuildFailed: If they cannot be built, for whatever reason.
    """
    with _one_line(kernels):
        import ninja

        kernels.build.mkdir(parents=True, exist_ok=True)
        (kernels.build / "build.ninja").write_text(ninja_file(kernels))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        log = kernels.build / LOG
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(kernels.build), *jobs]
        with (
            log.open("w") as kept,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run,
        ):
            for line in run.stdout or ():
                kept.write(line)
                if verbose and line.startswith("["):
                    print(line.rstrip(), file=sys.stderr, flush=True)
        if run.returncode:
            raise BuildFailed(f"{failure(log.read_text())} (log: {log})")
    return [kernels.build / "libplop_ext.so", kernels.build / kernels.loader]


@contextmanager
def _one_line(kernels: Kernels) -> Iterator[None]:
    """Turn anything that goes wrong within the block into a `BuildFailed`: an installation never fails for it."""
    try:
        yield
    except BuildFailed:
        raise
    except OSError as error:
        raise BuildFailed(f"{error.strerror or error} ({error.filename or kernels.build})") from error
    except Exception as error:
        text = str(error).strip().splitlines()
        raise BuildFailed(f"{type(error).__name__}: {text[0] if text else 'no reason given'}") from error


def failure(log: str) -> str:
    """Return the step that failed and why, in one line, from ninja's output."""
    lines = log.splitlines()
    failed = next((index for index, line in enumerate(lines) if line.startswith("FAILED: ")), len(lines))
    step = next((line for line in reversed(lines[:failed]) if line.startswith("[")), "")
    what = re.sub(r"^\[\d+/\d+\] ", "", step) or "the build"
    said = []
    for line in lines[failed + 2 :]:  # after the command itself, which may hold the word, up to the next step
        if line.startswith(("ninja: ", "FAILED: ", "[")):
            break
        said.append(line.strip())
    for line in said:
        match = _ERROR.search(line)
        if match:
            return f"{what} failed: {(match[2] or match[4]).strip()}"
    return f"{what} failed: {next(filter(None, reversed(said)), 'no reason given')}"


def ninja_file(kernels: Kernels) -> str:
    """Return the text of build.ninja."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths

    root, build, nvcc = kernels.root, kernels.build, kernels.nvcc
    version = (root / "plop_ext/_version.py").read_text().split('"')[-2]
    cxx = shutil.which(os.environ.get("CXX", "g++"))
    torch_lib = Path(torch.__file__).parent / "lib"
    common = f"-O{1 if DEBUG else 3} -std=c++17" + (" -g" if DEBUG else "")
    warnings = "-Wall -Wextra" + (" -Werror" if DEBUG else "")
    includes = " ".join(f"-isystem {path}" for path in include_paths())
    gencode, archs = arch_flags(nvcc) if nvcc else ([], "")
    cuda_version = nvcc_release(nvcc) if nvcc else ""
    facts = {
        "PLOP_VERSION": version,
        "PLOP_CUDA_VERSION": cuda_version,
        "PLOP_CUDA_ARCHS": archs,
        "PLOP_TORCH_TARGET": TORCH_TARGET,
        "PLOP_BUILD_TORCH": torch.__version__,
    }
    defines = " ".join(f"""'-D{name}="{value}"'""" for name, value in facts.items())
    with_cuda = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}" + (" -DUSE_CUDA -DPLOP_WITH_CUDA" if nvcc else "")
    # A tenth of the size on disk; nvcc knows the flag since 12.8.
    smaller = "--compress-mode=size" if nvcc and is_at_least(cuda_version, (12, 8)) else ""
    deps = "-MMD -MF $out.d"
    depfile = "\n  depfile = $out.d\n  deps = gcc"
    # Products and sums round one by one, as separate PyTorch operators do, on every instruction set.
    rounding = "-ffp-contract=off"
    host = f"{common} {rounding} {warnings} -ffile-prefix-map={root}/= -fPIC -fvisibility=hidden {deps}"
    device = f"{common} -lineinfo {smaller} -Xcompiler -fPIC,-fvisibility=hidden $gencode {deps}"
    python = f"-I{pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
    # libtorch.so must be NEEDED though no symbol of it is used: in CUDA builds of torch it alone pulls in
    # libtorch_cuda, where the weak stream symbol lives. nvcc links since it knows where its static runtime is.
    # A kernel that is missing is an error here and not where the library is loaded.
    flags = ("--no-as-needed", "--no-undefined")
    linker = f"{nvcc} -cudart static" if nvcc else str(cxx)
    linker += "".join(f" -Xlinker {flag}" for flag in flags)
    rules = {
        "cxx": f"{cxx} {host} {with_cuda} {includes} -c $in -o $out{depfile}",
        "nvcc": f"{nvcc} {device} -c $in -o $out{depfile}",
        "link": f"{linker} -shared $in -o $out -L{torch_lib} -ltorch -ltorch_cpu -lc10",
        "loader": f"{cxx} {host} {defines} -shared {python} $in -o $out -ldl{depfile}",
    }
    lines = [f"rule {name}\n  description = $what\n  command = {command}" for name, command in rules.items()]
    objects = []
    for rule, sources in (("cxx", KERNEL_SOURCES), ("nvcc", CUDA_SOURCES if nvcc else ())):
        for source in sources:
            objects.append(build / (source.replace("/", "_") + ".o"))
            lines.append(f"build {objects[-1]}: {rule} {root / 'csrc' / source}\n  what = compiling csrc/{source}")
            if rule == "nvcc":
                lines.append(f"  gencode = {' '.join(source_flags(source, gencode, cuda_version))}")
    library = build / "libplop_ext.so"
    lines.append(f"build {library}: link {' '.join(map(str, objects))}\n  what = linking {library.name}")
    source = "csrc/python/module.cpp"
    lines.append(f"build {build / kernels.loader}: loader {root / source}\n  what = compiling {source}")
    return "\n".join(lines) + "\n"
