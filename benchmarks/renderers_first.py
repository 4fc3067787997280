"""The tables of what a user waits for: the first seconds of the command, and the whole call of `score`."""

from __future__ import annotations

from benchmarks.markdown import Result, table


def first_seconds(result: Result) -> str:
    """Tabulate one row per case, cold and warm."""
    settings = result["settings"]
    rows = []
    for row in result["rows"]:
        seconds = "failed" if row["seconds"] is None else f"{row['seconds']:.2f}"
        limit = f"{row['limit']:.2f}" if "limit" in row else ""
        rows.append([row["case"], row["cache"], seconds, limit, f"{row['cached_share']:.2f}", str(row["runs"])])
    header = ["process", "file cache", "seconds", "at most", "share of the files in the cache before", "runs"]
    size = f"{settings['bytes'] / 1e9:.1f} GB"
    return f"{settings['shape']}, {size} of weights, data {settings['data']}.\n\n{table(header, rows)}"


def whole_api(result: Result) -> str:
    """Tabulate one row per model and case; the ratio of every way to plain forwards."""
    ways = list(dict.fromkeys(row["way"] for row in result["rows"]))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["rows"]:
        case = f"{row['batch']} x {row['tokens']} x {row['batches']}"
        text = f"{row['ms']:.0f} ms" if row["way"] == ways[0] else f"{row['ratio']:.3f}"
        cells.setdefault((row["model"], case), {})[row["way"]] = text
    header = ["model", "samples x tokens x batches", *ways]
    return table(header, [[*key, *(values.get(way, "") for way in ways)] for key, values in cells.items()])


RENDERERS = {"first_seconds": first_seconds, "whole_api": whole_api}
