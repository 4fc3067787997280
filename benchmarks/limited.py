"""Runs a command under a hard memory limit that the kernel enforces: a control group, or a limit on its data."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_V2 = Path("/sys/fs/cgroup")
_V1 = Path("/sys/fs/cgroup/memory")


def run(command: Sequence[str], limit: int, *, cwd: Path, env: Mapping[str, str]) -> tuple[int, str]:
    """Run `command` with at most `limit` bytes of memory, page cache included where the limit counts it.

    Returns:
        Its exit status, -9 if the kernel killed it, and how the limit was enforced.
    """
    group, kind = _make_group(limit)

    def enter() -> None:
        if group is None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        else:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        done = subprocess.run(command, cwd=cwd, env=dict(env), preexec_fn=enter)
        return done.returncode, kind
    finally:
        if group is not None:
            group.rmdir()


def _make_group(limit: int) -> tuple[Path | None, str]:
    """Return a control group with the limit, or None where none can be made."""
    for root, field, kind in (
        (_V2, "memory.max", "control group v2, memory.max"),
        (_V1, "memory.limit_in_bytes", "control group v1, memory.limit_in_bytes"),
    ):
        group = root / f"plop-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if not (group / field).is_file():  # an ordinary folder: no control groups of this version here
            group.rmdir()
            continue
        try:
            (group / field).write_text(str(limit))
            swap = group / "memory.swap.max"
            if swap.exists():
                swap.write_text("0")
        except OSError:
            group.rmdir()
            continue
        return group, kind
    return None, "RLIMIT_DATA"
