"""Available memory, memory of the process, and sizes in text."""

from __future__ import annotations

from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30

# The memory limit of the process's control group, version 2 and 1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# Fields of its usage for the page cache, which the system drops when memory is needed.
_CACHED = (("active_file", "inactive_file"), ("total_active_file", "total_inactive_file"))
_USAGES = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def format_size(n_bytes: float) -> str:
    """Return the size as text: `1.50 GiB`, or `12.0 MiB` below one GiB."""
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:.1f} MiB"


def rss() -> int:
    """Return the bytes of RAM that the process uses at present."""
    return _status("VmRSS")


def peak_rss() -> int:
    """Return the peak bytes of RAM that the process has used since `reset_peak_rss`, or since its start."""
    return _status("VmHWM")


def reset_peak_rss() -> bool:
    """Reset `peak_rss`; return False if the system does not support it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def total_ram() -> int:
    """Return the bytes of RAM that this process could have at most: the machine's, or a control group's limit."""
    room = [1 << 60]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        room.append(int(lines["MemTotal"].split()[0]) * 1024)
    for limit in _LIMITS:
        try:
            most = Path(limit).read_text().strip()
        except OSError:
            continue
        if most.isdigit():
            room.append(int(most))
    return min(room)


def available_ram() -> int:
    """Return the bytes of RAM available to this process: the machine's, or less under a control group's limit."""
    room = [1 << 60]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        room.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for limit, usage, fields in zip(_LIMITS, _USAGES, _CACHED, strict=True):
        try:
            most, used = Path(limit).read_text().strip(), int(Path(usage).read_text())
        except (OSError, ValueError):
            continue
        if most.isdigit():
            used -= _cached(Path(usage).with_name("memory.stat"), fields)
            room.append(max(int(most) - max(used, 0), 0))
    return min(room)


def _cached(stat: Path, fields: tuple[str, ...]) -> int:
    try:
        counts = dict(line.split() for line in stat.read_text().splitlines())
        return sum(int(counts.get(name, 0)) for name in fields)
    except (OSError, ValueError):
        return 0


def _status(field: str) -> int:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[field].split()[0]) * 1024
    except (OSError, KeyError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
