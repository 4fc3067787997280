"""Registers, shared memory and spills of every CUDA kernel, as the compiler reports them for Hopper, spills for every
architecture that the library is built for, and whether a kernel reaches for memory before it has waited for the one in
front of it (`csrc/cuda/launch.cuh`).

python -m benchmarks.resources --output benchmarks/results/resources.json   compiles csrc/cuda with nvcc
python -m benchmarks.resources --check benchmarks/results/resources.json    fails on spills, or if the sources changed
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from plop_ext.files import write_text_atomic

SOURCES = environment.ROOT / "csrc"
ARCH = "90"
FLAGS = ("-O3", "-std=c++17", "-Xptxas", "-v")


def source_digest() -> str:
    """Of every file that the CUDA kernels may include, and of what they are compiled with."""
    digest = hashlib.sha256(" ".join((*FLAGS, *toolchain().DEFAULT_ARCHS)).encode())
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("cuda/*.cu*")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def toolchain() -> Any:
    """Return the module that knows nvcc and the architectures."""
    sys.path.insert(0, str(environment.ROOT / "scripts"))
    import toolchain

    return toolchain


def report(nvcc: Path, source: Path) -> str:
    """Return what ptxas says about the kernels of one file, for all architectures."""
    targets = _targets(nvcc, source, toolchain().DEFAULT_ARCHS)
    with tempfile.TemporaryDirectory() as folder:
        said = _compile(nvcc, *targets, "-c", str(source), "-o", f"{folder}/out.o")
    return subprocess.run(["c++filt"], input=said, capture_output=True, text=True, check=True).stdout


def ptx(nvcc: Path, source: Path) -> str:
    """Return the kernels of one file in the compiler's intermediate language, for Hopper."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out.ptx")
        _compile(nvcc, *_targets(nvcc, source, [ARCH]), "-ptx", str(source), "-o", str(output))
        return output.read_text(encoding="utf-8")


def _targets(nvcc: Path, source: Path, archs: Sequence[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    found: list[str] = toolchain().source_flags(source.name, flags, toolchain().nvcc_release(nvcc))
    return found


def _compile(nvcc: Path, *arguments: str) -> str:
    done = subprocess.run([str(nvcc), *FLAGS, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stderr


def impatient(text: str) -> list[str]:
    """Return the kernels of a PTX file that access global memory before they wait for the preceding kernel.

    The compiler may move a load that it takes for one of constants in front of the wait.
    """
    found = []
    for kernel in re.split(r"^\.(?:visible |weak )?\.?entry ", text, flags=re.MULTILINE)[1:]:
        name, body = re.split(r"\(", kernel, maxsplit=1)
        access = re.search(r"\b(?:ld|st|atom|red|cp)\.(?!param|shared|local|const)", body)
        wait = body.find("griddepcontrol.wait")
        if wait < 0 or (access is not None and access.start() < wait):
            found.append(name.strip())
    return found


def parse(text: str) -> Iterator[dict[str, Any]]:
    """Tabulate one row per kernel and architecture of a (demangled) report."""
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>.+?)' for 'sm_(?P<arch>\d+)a?'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for match in pattern.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        yield {
            "kernel": kernel_name(match["kernel"]),
            "arch": match["arch"],
            "registers": int(match["registers"]),
            "shared_bytes": int(shared[1]) if shared else 0,
            "stack_bytes": int(match["stack"]),
            "spill_bytes": int(match["stores"]) + int(match["loads"]),
        }


def spills(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the kernels that keep registers in memory, with the architecture."""
    return [f"{row['kernel']} for sm_{row['arch']}" for row in rows if row["spill_bytes"]]


def check(result: dict[str, Any]) -> None:
    """Exit with a message if the report is of other sources, or one of a kernel with spills or without a wait."""
    if result["settings"]["sources"] != source_digest():
        raise SystemExit("csrc/cuda has changed: make resources")
    if found := spills(result["rows"]):
        raise SystemExit("registers spill to memory in:\n" + "\n".join(found))
    if early := result["settings"]["access_before_wait"]:
        raise SystemExit("memory is accessed before the wait for the kernel in front in:\n" + "\n".join(early))


def kernel_name(name: str) -> str:
    """Return a demangled kernel's name and template arguments, without namespaces, casts and parameters."""
    # ncu writes `unnamed>::` for `plop_ext::<unnamed>::`.
    name = re.sub(r"\(anonymous namespace\)::|<?unnamed>::|\bplop_ext::|\bvoid ", "", name)
    return re.sub(r"\([^()]*\)$", "", re.sub(r"\(\w+\)(?=\d)", "", name)).strip()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--check", type=Path, metavar="RESULT")
    args = parser.parse_args(argv)
    if args.check is not None:
        check(json.loads(args.check.read_text(encoding="utf-8")))
        return
    nvcc = toolchain().find_nvcc()
    if nvcc is None:
        raise SystemExit("there is no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted(SOURCES.glob("cuda/*.cu"))
        texts = list(pool.map(lambda source: report(nvcc, source), sources))
        early = [name for text in pool.map(lambda source: ptx(nvcc, source), sources) for name in impatient(text)]
    everywhere = [row for text in texts for row in parse(text)]
    # The others' registers are of no interest unless they spill.
    kept = [row for row in everywhere if row["arch"] == ARCH or row["spill_bytes"]]
    rows = sorted(kept, key=lambda row: (str(row["kernel"]), str(row["arch"])))
    result = {
        "benchmark": "resources",
        "quick": False,
        "environment": environment.describe(torch.device("cpu"), "make resources"),
        "settings": {
            "nvcc": toolchain().nvcc_release(nvcc),
            "arch": f"sm_{ARCH}",
            "spills_checked": [f"sm_{arch}" for arch in toolchain().DEFAULT_ARCHS],
            "access_before_wait": early,
            "sources": source_digest(),
        },
        "rows": rows,
    }
    if args.output is not None:
        write_text_atomic(args.output, json.dumps(result, indent=1) + "\n")
    for row in rows:
        if row["stack_bytes"] or row["spill_bytes"]:
            where = f"{row['kernel']}, sm_{row['arch']}"
            print(f"{where}: {row['stack_bytes']} bytes of stack, {row['spill_bytes']} of spills")
    check(result)


if __name__ == "__main__":
    main()
