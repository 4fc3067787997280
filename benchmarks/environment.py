"""What a figure was measured with: the record that every result file carries.

python -m benchmarks.environment [--device cuda]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from plop_ext import ops
from plop_ext._version import __version__

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device, command: str) -> dict[str, str | int | None]:
    """Hardware, software and origin of a measurement on `device` made by `command`."""
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "plop_ext": __version__,
        "backend": ops.STATUS.backend(device),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def commit() -> str | None:
    """Return the commit measured, with `-dirty` if the tree differs; without git, PLOP_COMMIT."""
    given = os.environ.get("PLOP_COMMIT")
    head = given or _output("git", "rev-parse", "HEAD")
    if given or head is None:
        return given
    # Result files are what a benchmark writes, so they do not make the measured code another one.
    changes = _output("git", "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return head + "-dirty" if changes else head


def _output(*command: str) -> str | None:
    """First line that `command` prints, or None if it fails, is missing or prints nothing."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    print(json.dumps(describe(device, "python -m benchmarks.environment"), indent=1))


if __name__ == "__main__":
    main()
