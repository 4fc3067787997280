"""The tables of the fast path's benchmarks."""

from __future__ import annotations

from benchmarks.markdown import Result, spread, table

_BASES = {
    "of_compiled": "x plain, compiled",
    "of_whole": "x plain, compiled as a whole",
    "of_graph": "x plain, CUDA graph",
}


def model_forward(result: Result) -> str:
    """Tabulate one row per model, batch and candidate, small batches first; those that did not run too."""
    settings, rows = result["settings"], []
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    bases = [key for key in _BASES if any(key in row for row in result["rows"])]
    for row in sorted(result["rows"], key=lambda row: (models.index(row["model"]), row["batch"] * row["tokens"])):
        case = [row["model"], f"{row['batch']} x {row['tokens']}", row["candidate"]]
        if "error" in row:
            rows.append([*case, *[""] * (6 + len(bases)), row["error"].replace("|", "/")])
            continue
        memory, floor = row["extra_peak_mib"], row.get("floor_ms")
        rows.append(
            [
                *case,
                f"{row['ms']:.2f}",
                spread(row, "ratio"),
                *(f"{row[key]:.3f}" if key in row else "" for key in bases),
                "" if memory is None else f"{memory:+.1f}",
                f"{row['setup_s']:.1f}" if "setup_s" in row else "",
                "" if floor is None else f"{floor:.2f} ({row['of_floor']:.2f})",
                str(row["rounds"]),
                row.get("note", "").replace("|", "/"),
            ]
        )
    header = [
        "model",
        "batch",
        "candidate",
        "ms",
        "x plain forward, median (p20-p80)",
        *(_BASES[key] for key in bases),
    ]
    header += ["extra peak memory, MiB", "setup, s", "roofline, ms (x)", "rounds", "note"]
    facts = (
        f"{settings['dtype']}; roofline at {settings['copy_gb_per_s']:.0f} GB/s of a copy and "
        f"{settings['matmul_tflop_per_s']:.0f} TFLOP/s of a matrix product.\n\n"
    )
    return facts + table(header, rows)


def fused_kernels(result: Result) -> str:
    """Tabulate one row per op, shape, dtype and number of tokens."""
    settings = result["settings"]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    names = list(dict.fromkeys(row["candidate"] for row in result["rows"]))
    for row in result["rows"]:
        key = row["op"], row["model"], row["shape"], row["dtype"], str(row["tokens"]), f"{row['mib']:g}"
        text = f"{row['gb_per_s']:.0f} ({row['of_large_copy']:.2f})"
        if row["candidate"] != "copy":
            text = f"{row['gb_per_s']:.0f} ({row['of_copy']:.2f}; {row['of_large_copy']:.2f})"
        cells.setdefault(key, {})[row["candidate"]] = text
    header = ["op", "model", "shape", "dtype", "tokens", "MiB moved", *names]
    facts = (
        "GB/s, and in parentheses the share of a copy of as many bytes and of a copy of 1 GiB "
        f"({settings['large_copy_gb_per_s']:.0f} GB/s).\n\n"
    )
    return facts + table(header, [[*key, *(values[name] for name in names)] for key, values in cells.items()])


def gated_projection(result: Result) -> str:
    """Tabulate one row per model and number of tokens."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    names = list(dict.fromkeys(row["candidate"] for row in result["rows"]))
    for row in result["rows"]:
        text = f"{row['us_per_call']:.0f} ({row['ratio']:.3f}; {row['tflop_per_s']:.0f})"
        cells.setdefault((row["model"], row["shape"], str(row["tokens"])), {})[row["candidate"]] = text
    header = ["model", "features", "tokens", *names]
    facts = f"{result['settings']['dtype']}; us, and in parentheses the ratio to the second candidate and TFLOP/s.\n\n"
    return facts + table(header, [[*key, *(values[name] for name in names)] for key, values in cells.items()])


def profile_kernels(result: Result) -> str:
    """Tabulate one row per kernel and shape."""
    rows = [
        [
            row["op"],
            " ".join(part for part in (row["model"], row["shape"]) if part),
            _figure(row["registers"], 0),
            _figure(row["occupancy"], 0),
            _figure(row["dram_share"], 0),
            _figure(row["issue_share"], 0),
            _figure(row.get("tensor_share"), 0),
            _figure(row["l2_hit_rate"], 0),
            _figure(row["us"], 1),
            row["bound"],
        ]
        for row in result["rows"]
    ]
    header = [
        "kernel",
        "shape",
        "registers",
        "achieved occupancy, %",
        "DRAM, % of peak",
        "issue slots, %",
        "tensor pipes, %",
    ]
    return table([*header, "L2 hits, %", "us", "bound by"], rows)


def resources(result: Result) -> str:
    """Tabulate one row per kernel template: the range over its instances."""
    kernels: dict[str, list[Result]] = {}
    for row in result["rows"]:
        kernels.setdefault(row["kernel"].partition("<")[0], []).append(row)
    rows = [
        [
            name,
            str(len(found)),
            *(_span([row[field] for row in found]) for field in ("registers", "shared_bytes", "stack_bytes")),
            _span([row["spill_bytes"] for row in found]),
        ]
        for name, found in kernels.items()
    ]
    header = ["kernel", "instances", "registers", "shared memory, bytes", "stack, bytes", "spills, bytes"]
    return f"nvcc {result['settings']['nvcc']}, {result['settings']['arch']}.\n\n" + table(header, rows)


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _span(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"


RENDERERS = {
    "model_forward": model_forward,
    "fused_kernels": fused_kernels,
    "gated_projection": gated_projection,
    "profile_kernels": profile_kernels,
    "resources": resources,
}
