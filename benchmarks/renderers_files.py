"""Tables of the benchmarks of files and of the demo."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.markdown import Result, table


def demo_seeds(result: Result) -> str:
    """Tabulate one row per seed."""
    rows = [
        [
            str(row["seed"]),
            f"{row['decision']}: {row['winner']}",
            row["compared"],
            f"{row['mean']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})",
            f"{row['seconds']:.0f} ({row['processor_seconds']:.0f})",
        ]
        for row in result["rows"]
    ]
    header = ["seed", "verdict", "compared with all-linear", "difference in test loss, 95 % interval"]
    settings = result["settings"]
    note = f"{settings['parallel']} at a time, cores of each: {settings['cores_each']}."
    return f"{note}\n\n{table([*header, 'seconds (of all cores)'], rows)}"


def large_files(result: Result) -> str:
    """Tabulate one row per command and file."""
    rows = [
        [
            f"plop {row['command']}",
            f"{row['modules']:,}",
            f"{row['types']:,}",
            f"{row['megabytes']:.0f}",
            f"{row['output_megabytes']:.2f}",
            f"{row['seconds']:.1f} ({row['processor_seconds']:.1f})",
        ]
        for row in result["rows"]
    ]
    header = ["command", "modules", "types", "scores, MB", "output, MB", "seconds (of all cores)"]
    return table(header, rows)


RENDERERS: dict[str, Callable[[Result], str]] = {"demo_seeds": demo_seeds, "large_files": large_files}
