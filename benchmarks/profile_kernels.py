"""What Nsight Compute sees of each kernel: a script for it to run, and a reader of what it writes.

ncu --csv ... python -m benchmarks.profile_kernels > ncu.csv            launches each kernel once per shape
python -m benchmarks.profile_kernels --read ncu.csv --output ncu.json   turns what ncu wrote into a result file

`make gpu-profile` does both. Rows are bf16, as many as a batch of 8 x 1024 tokens has, or every 8th of them, and 256
for one model. Before each launch the device is kept busy for a moment, so that its clocks are those of a run.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.fused_cases import CASES
from benchmarks.gated_projection import FUSED, runs
from benchmarks.resources import kernel_name
from benchmarks.roofline import Widths
from benchmarks.shapes import SHAPES
from plop_ext import ops
from plop_ext.files import write_text_atomic

MODELS = ("llama-3.1-8b", "qwen3-0.6b", "qwen3-8b", "gemma-2-9b")
TOKENS, FEW_TOKENS = 8192, 256
SUMSQ_FEATURES = (128, 1024, 4096, 14336)
# Input and output of q or o, gate and down of `MODELS[0]`.
PAIR_FEATURES = ((4096, 4096), (4096, 14336), (14336, 4096))
# Field of a row, ncu's metric.
METRICS = {
    "dram_share": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_bytes": "dram__bytes.sum",
    "us": "gpu__time_duration.sum",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue_share": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "tensor_share": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "blocks_by_registers": "launch__occupancy_limit_registers",
    "blocks_by_shared_memory": "launch__occupancy_limit_shared_mem",
    "blocks_by_warps": "launch__occupancy_limit_warps",
    "instructions": "smsp__inst_executed.sum",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "l2_hit_rate": "lts__t_sector_hit_rate.pct",
}
_SCALE = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
_SCALE |= {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


@dataclass(frozen=True)
class Launch:
    """One call of an op.

    Attributes:
        op: Its name without the underscore at its end, which is part of the names of its kernels.
        model: Key of `SHAPES`, or empty.
        shape: As tables show it.
        prepare: Makes the tensors and returns the call.
    """

    op: str
    model: str
    shape: str
    prepare: Callable[[], Callable[[], None]]


def launches(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Return every call, in the order in which they are made."""
    found = []
    for kind in CASES:
        for model in MODELS:
            for tokens in (TOKENS, FEW_TOKENS) if model == MODELS[0] else (TOKENS,):
                case = kind(model, tokens, dtype, device)
                shape = f"{tokens} x {case.label}"
                found.append(Launch(case.op.rstrip("_"), model, shape, lambda case=case: _call(case)))  # type: ignore[misc]
    for model in MODELS:
        sizes = Widths.of(SHAPES[model])
        shape = f"{TOKENS} x K {sizes.hidden}, I {sizes.intermediate}"
        found.append(Launch("gated_projection", model, shape, partial(_gated_projection, model, device)))
    for features in SUMSQ_FEATURES:
        rows = TOKENS * (32 if features == 128 else 1)
        prepare = partial(_row_sumsq, rows, features, dtype, device)
        found.append(Launch("row_sumsq", "", f"{rows} x {features}", prepare))
    for rows in (TOKENS, TOKENS // 8, FEW_TOKENS):
        for widths in PAIR_FEATURES:
            prepare = partial(_row_sumsq_pair, rows, widths, dtype, device)
            found.append(Launch("row_sumsq_pair", "", f"{rows} x ({widths[0]} + {widths[1]})", prepare))
    layers = 7 * int(SHAPES[MODELS[0]]["num_hidden_layers"])
    shape = f"{layers} modules x {TOKENS} tokens"
    found.append(Launch("gain_totals", "", shape, partial(_gain_totals, layers, TOKENS, device)))
    return found


def _call(case: Any) -> Callable[[], None]:
    return partial(case.run, case.tensors())


def _gated_projection(model: str, device: torch.device) -> Callable[[], None]:
    return runs(model, TOKENS, device)[FUSED]


def _row_sumsq(rows: int, features: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    x, out = torch.randn(rows, features, device=device).to(dtype), torch.empty(rows, device=device)
    return partial(ops.row_sumsq_, out, x)


def _row_sumsq_pair(
    rows: int, widths: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    x, y = (torch.randn(rows, width, device=device).to(dtype) for width in widths)
    return partial(ops.row_sumsq_pair_, torch.empty(2 * rows, device=device), x, y)


def _gain_totals(layers: int, tokens: int, device: torch.device) -> Callable[[], None]:
    totals = torch.zeros(layers, 8, 5, dtype=torch.float64, device=device)
    sums = torch.rand(2 * layers * tokens, device=device)
    counted = torch.ones(tokens, dtype=torch.bool, device=device)
    offsets = torch.arange(0, tokens + 1, tokens // 8, device=device)
    records = [number for index in range(layers) for number in (index, 2 * index * tokens, (2 * index + 1) * tokens)]
    return partial(ops.gain_totals_, totals, sums, counted, offsets, records)


def run(device: torch.device) -> None:
    """Make every call once."""
    busy = torch.randn(4096, 4096, device=device).to(torch.bfloat16) if device.type == "cuda" else None
    for launch in launches(device):
        call = launch.prepare()
        if busy is not None:
            for _ in range(200):
                torch.mm(busy, busy)
            torch.cuda.synchronize(device)
        call()


def read(lines: Iterable[str], planned: Sequence[Launch]) -> list[dict[str, Any]]:
    """Return the rows of what ncu wrote: one per kernel and shape.

    Args:
        lines: ncu's output, one line per metric.
        planned: The calls. An op of several kernels launches all of them in each call.
    """
    kernels = list(_kernels(lines))
    rows = []
    for op in dict.fromkeys(launch.op for launch in planned):
        calls = [launch for launch in planned if launch.op == op]
        seen = [kernel for kernel in kernels if f"{op}_kernel" in kernel["kernel"]]
        each, rest = divmod(len(seen), len(calls))
        if rest or not each:
            raise ValueError(f"{op}: {len(seen)} kernels do not belong to {len(calls)} calls")
        for index, kernel in enumerate(seen):
            call = calls[index // each]
            rows.append({"op": op, "model": call.model, "shape": call.shape, **kernel, "bound": bound(kernel)})
    return rows


def bound(kernel: dict[str, Any]) -> str:
    """Return what keeps a kernel from being faster, as far as its figures tell."""
    if (kernel["tensor_share"] or 0) >= 70:
        return "tensor cores"
    if (kernel["dram_share"] or 0) >= 80:
        return "memory bandwidth"
    if (kernel["issue_share"] or 0) >= 70:
        return "instructions"
    limits = {name: kernel[f"blocks_by_{name}"] for name in ("registers", "shared_memory", "warps")}
    known = {name: limit for name, limit in limits.items() if limit is not None}
    lowest = min(known, key=lambda name: known[name]) if known else None
    if lowest not in (None, "warps") and (kernel["occupancy"] or 0) < 50:
        return f"latency, few warps by {lowest.replace('_', ' ')}"
    return "latency"


def _kernels(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    table = list(lines)
    start = next((index for index, line in enumerate(table) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError('no line begins with "ID": is this the CSV output of ncu?')
    found: dict[str, dict[str, Any]] = {}
    fields = {metric: name for name, metric in METRICS.items()}
    for line in csv.DictReader(line for line in table[start:] if line.startswith('"')):
        kernel = found.setdefault(line["ID"], {"kernel": kernel_name(line["Kernel Name"]), **dict.fromkeys(METRICS)})
        if line["Metric Name"] in fields:
            kernel[fields[line["Metric Name"]]] = _number(line["Metric Value"], line["Metric Unit"])
    yield from found.values()


def _number(text: str, unit: str) -> float | None:
    try:
        value = float(text.replace(",", "")) * _SCALE.get(unit, 1.0)
    except ValueError:
        return None
    return round(value, 3) if math.isfinite(value) else None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--metrics", action="store_true", help="print those that --read needs, for ncu's option")
    parser.add_argument("--read", type=Path, metavar="CSV", help="what ncu wrote")
    parser.add_argument("--output", type=Path, help="with --read: the result file")
    args = parser.parse_args(argv)
    if args.metrics:
        print(",".join(METRICS.values()))
        return
    device = torch.device(args.device)
    if args.read is None:
        run(device)
        return
    with args.read.open(encoding="utf-8") as file:
        rows = read(file, launches(device))
    result = {
        "benchmark": "profile_kernels",
        "quick": False,
        "environment": environment.describe(device, "make gpu-profile"),
        "settings": {"dtype": "bf16"},
        "rows": rows,
    }
    text = json.dumps(result, indent=1) + "\n"
    if args.output is None:
        print(text, end="")
    else:
        write_text_atomic(args.output, text)


if __name__ == "__main__":
    main()
