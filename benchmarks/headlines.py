"""The figures of each result file that the README shows: what, measured, on which device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Result = Mapping[str, Any]


def _where(result: Result) -> str:
    env = result["environment"]
    return env["gpu"] or f"{env['threads']} CPU threads"


def _bandwidth_headlines(result: Result) -> list[tuple[str, str, str]]:
    found = []
    for rows_of, low, high in (("model width (1024 features and more)", 1024, 1 << 62), ("128 features", 128, 129)):
        shares = [
            row["of_copy"]
            for row in result["rows"]
            if row["candidate"] == "plop_ext"
            and row["dtype"] == "bf16"
            and row["mib"] >= 256
            and low <= row["features"] < high
        ]
        if shares:
            what = f"kernel's read bandwidth / the device's copy bandwidth, bf16, 256 MiB and more, rows of {rows_of}"
            low_share, high_share = f"{min(shares):.2f}", f"{max(shares):.2f}"
            text = low_share if low_share == high_share else f"{low_share} to {high_share}"
            found.append((what, text, _where(result)))
    return found


def _overhead_headlines(result: Result) -> list[tuple[str, str, str]]:
    settings, found = result["settings"], []
    shape = f"{settings['shape']}, {settings['batch']} x {settings['tokens']}"
    for row in result["rows"]:
        if row["candidate"] != "plain forward":
            what = f"{row['candidate']} / plain forward, {shape}"
            found.append((what, f"{row['ratio']:.3f}" if row["ratio"] < 3 else f"{row['ratio']:.1f}", _where(result)))
        if row["candidate"] == "plop_ext" and row["extra_peak_mib"] is not None:
            found.append((f"plop_ext's extra memory, {shape}", f"{row['extra_peak_mib']:.1f} MiB", _where(result)))
    return found


def _accuracy_headlines(result: Result) -> list[tuple[str, str, str]]:
    return [
        (f"largest relative error of a module's NFN, {row['dtype']} model", f"{row['max_relative_error']:.0e}", "CPU")
        for row in result["rows"]
        if row["case"] == "llama"
    ]


def _placement_headlines(result: Result) -> list[tuple[str, str, str]]:
    settings, found = result["settings"], []
    for row in result["rows"]:
        if row["candidate"] == "plop_ext":
            what = f"published script / plop_ext, model to placement, {settings['shape']}, batches of {row['batch']}"
            found.append((what, f"{row['times_faster']:.0f}", _where(result)))
    return found


def _early_stop_headlines(result: Result) -> list[tuple[str, str, str]]:
    what = f"early stops on the placement of all {result['settings']['samples']} samples"
    return [
        (what, f"{row['same']} of {row['seeds']}, after {row['samples_max']} samples at most", _where(result))
        for row in result["rows"]
        if row["watched"] == "3 types" and row["batch"] == 8
    ]


def _streaming_headlines(result: Result) -> list[tuple[str, str, str]]:
    settings, found = result["settings"], []
    size = f"{settings['shape']}, {settings['checkpoint_bytes'] / 1e9:.0f} GB"
    data = f"{settings['samples']} x {settings['tokens']} tokens"
    if "limit" in settings:
        limit = f"{size}, under a hard limit of {settings['limit'] / 2**30:.0f} GiB"
        peak = next(row["peak_rss"] for row in result["rows"] if row["case"] == "streamed")
        return [(f"peak RAM of streaming {limit}", f"{peak / 2**30:.2f} GiB", _where(result))]
    if settings["peak_device"] is not None:
        what = f"peak GPU memory of streaming {size}, {data}"
        over = settings["peak_over_two_blocks"] / 2**30
        text = f"{settings['peak_device'] / 2**30:.2f} GiB, two blocks and {over:.2f}"
        found.append((what, text, _where(result)))
    for row in result["rows"]:
        if row["case"] == "streamed":
            what = f"streaming {size} / the slowest of disk, copy and compute alone"
            found.append((what, f"{row['of_floor']:.2f}", _where(result)))
        elif "batches_run" in row:
            what = f"{row['case']}, batches of {row.get('batch', settings['batch'])} / streaming {size}"
            found.append((what, f"{row['times_streamed']:.1f}", _where(result)))
    return found


# Candidate, field that holds the ratio, what it is a ratio to, batch.
_FORWARDS = (
    ("plop_ext", "ratio", "plain forward", (8, 1024)),
    ("plop_ext, token_step=8", "ratio", "plain forward", (8, 1024)),
    ("best plain-PyTorch hooks", "ratio", "plain forward", (8, 1024)),
    ("usual hooks", "ratio", "plain forward", (8, 1024)),
    ("published script", "ratio", "plain forward", (8, 1024)),
    ("plain forward, compiled", "ratio", "plain forward", (8, 1024)),
    ("best plain-PyTorch hooks, compiled", "ratio", "plain forward", (8, 1024)),
    ("plop_ext fast", "ratio", "plain forward", (8, 1024)),
    ("plop_ext fast", "of_compiled", "plain forward, compiled", (8, 1024)),
    ("plop_ext fast", "of_whole", "plain forward, compiled as a whole", (8, 1024)),
    ("plop_ext fast", "ratio", "plain forward", (16, 2048)),
    ("plop_ext fast", "of_compiled", "plain forward, compiled", (16, 2048)),
    ("plop_ext fast", "of_whole", "plain forward, compiled as a whole", (16, 2048)),
    ("plop_ext fast, CUDA graph", "of_graph", "plain forward, CUDA graph", (1, 256)),
)


def _forwards_headlines(result: Result) -> list[tuple[str, str, str]]:
    found = []
    for candidate, field, base, (batch, tokens) in _FORWARDS:
        what = f"{candidate} / {base}, llama-3.1-8b, {batch} x {tokens}"
        found += [
            (what, f"{row[field]:.3f}" if row[field] < 3 else f"{row[field]:.1f}", _where(result))
            for row in result["rows"]
            if (row["model"], row["batch"], row["tokens"], row["candidate"])
            == ("llama-3.1-8b", batch, tokens, candidate)
            and field in row
        ]
    return found


def _fused_headlines(result: Result) -> list[tuple[str, str, str]]:
    found = []
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        shares = [
            row["of_copy"]
            for row in result["rows"]
            if (row["op"], row["candidate"], row["tokens"], row["dtype"]) == (op, "plop_ext", 8192, "bf16")
        ]
        if shares:
            what = f"{op}'s bandwidth / that of a copy of as many bytes, 8192 tokens, bf16"
            found.append((what, f"{min(shares):.2f} to {max(shares):.2f}", _where(result)))
    return found


def _projection_headlines(result: Result) -> list[tuple[str, str, str]]:
    ratios = [
        row["ratio"] for row in result["rows"] if (row["candidate"], row["tokens"]) == ("gated_projection_", 8192)
    ]
    if not ratios:
        return []
    what = "gated_projection_ / cuBLAS' products and gated_activation_, 8192 tokens, bf16"
    return [(what, f"{min(ratios):.2f} to {max(ratios):.2f}", _where(result))]


HEADLINES: dict[str, Callable[[Result], list[tuple[str, str, str]]]] = {
    "kernel_bandwidth": _bandwidth_headlines,
    "fused_kernels": _fused_headlines,
    "gated_projection": _projection_headlines,
    "model_forward": _forwards_headlines,
    "moe_overhead": _overhead_headlines,
    "cpu_overhead": _overhead_headlines,
    "streaming": _streaming_headlines,
    "streaming_limit": _streaming_headlines,
    "accuracy": _accuracy_headlines,
    "time_to_placement": _placement_headlines,
    "early_stop": _early_stop_headlines,
}
