"""Compare two builds of the native library op by op: are their results bitwise identical?

python -m benchmarks.bitwise_before_after before/libplop_ext.so after/libplop_ext.so --device cuda

Each library runs in a process of its own on the same inputs; outputs are filled with NaN first, so an element that one
library leaves unwritten shows. Prints a table and exits with 1 if an output differs. `--bounded OP` accepts, for that
op, sums that differ by `SUM_BOUND` of their value and other outputs that differ by `OUTPUT_STEPS` steps.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OUTPUT_STEPS = 4  # of the dtype at the largest value: an RMSNorm of an RMSNorm rounds four times
SUM_BOUND = 1e-6  # relative; a sum of 16384 squares in 16 or more accumulators is off by a tenth of it
FUSED = (torch.bfloat16, torch.float16, torch.float32)
STEPS = ((1, 0), (3, 1))
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Case = tuple[str, str, list[Any], dict[str, Tensor]]  # op, what is special, arguments, outputs among them
Result = tuple[str, str, dict[str, Tensor]]


class Inputs:
    """Draw the same numbers in every process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.device, dtype)

    def blank(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=self.device)


def rows_read(rows: int, step: int, phase: int) -> int:
    return len(range(phase, rows, step))


def layouts(draw: Inputs, rows: int, width: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The same kind of matrix at every alignment and stride that the kernels tell apart."""
    yield "contiguous", draw.randn(rows, width, dtype=dtype)
    yield "columns of a wider one", draw.randn(rows, width + 16, dtype=dtype)[:, 8 : 8 + width]
    yield "odd offset and stride", draw.randn(rows, width + 3, dtype=dtype)[:, 1 : 1 + width]
    if rows * width <= 1 << 18:
        yield "transposed", draw.randn(width, rows, dtype=dtype).T
    if rows % 2 == 0:
        yield "batched", draw.randn(rows // 2, 3, width, dtype=dtype)[:, :2]


def row_sumsq_cases(draw: Inputs) -> Iterator[Case]:
    shapes = [(5, width) for width in (1, 7, 8, 64, 130, 256, 511, 896, 2312, 4096, 4097, 8000, 14336, 40000)]
    shapes += [(300, 1024), (1000, 96), (5000, 520), (5000, 1024)]
    for dtype in (*FUSED, torch.float64):
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        for rows, width in shapes:
            for layout, x in layouts(draw, rows, width, dtype):
                biases = {"none": None, "same type": draw.randn(width, dtype=dtype)}
                if dtype.itemsize == 2:
                    biases["float32"] = draw.randn(width)
                if x.dim() == 3:
                    biases["per inner row"] = draw.randn(*x.shape[1:], dtype=dtype)
                for (name, bias), (step, phase) in ((b, s) for b in biases.items() for s in STEPS):
                    out = draw.blank(rows_read(rows, step, phase), dtype=sums)
                    what = f"{dtype} {rows} x {width} {layout}, bias {name}, step {step}"
                    yield "row_sumsq_", what, [out, x, bias, step, phase], {"out": out}


def row_sumsq_pair_cases(draw: Inputs) -> Iterator[Case]:
    for dtype in (*FUSED, torch.float64):
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        for rows in (5, 256, 5000):
            for first, second in ((64, 128), (896, 1024), (4096, 2312), (1024, 4096), (2050, 4096)):
                x, y = draw.randn(rows, first, dtype=dtype), draw.randn(rows, second, dtype=dtype)
                biases = {"none": None, "same type": draw.randn(second, dtype=dtype)}
                if dtype.itemsize == 2:
                    biases["float32"] = draw.randn(second)
                for (name, bias), (step, phase) in ((b, s) for b in biases.items() for s in STEPS):
                    out = draw.blank(2 * rows_read(rows, step, phase), dtype=sums)
                    what = f"{dtype} {rows} x {first} and {second}, bias {name}, step {step}"
                    yield "row_sumsq_pair_", what, [out, x, y, bias, step, phase], {"out": out}


def gain_totals_cases(draw: Inputs) -> Iterator[Case]:
    for dtype in (torch.float32, torch.float64):
        for samples, groups, rows in ((1, 1, 3), (4, 1, 1000), (3, 8, 4000), (200, 2, 20000)):
            sumsq = draw.randn(3 * rows, dtype=dtype).square()
            sumsq[::17], sumsq[5::97], sumsq[7::101] = 0, float("inf"), float("nan")
            counted = draw.randn(rows) > -1
            offsets = torch.linspace(0, rows, samples * groups + 1).long().to(draw.device)
            totals = draw.randn(2 * groups + 1, samples, 5, dtype=torch.float64)
            records = [0, 0, rows, groups + 1, rows, 2 * rows]
            what = f"{dtype} {samples} samples, {groups} groups, {rows} rows"
            yield "gain_totals_", what, [totals, sumsq, counted, offsets, records], {"totals": totals}


def add_rms_norm_cases(draw: Inputs) -> Iterator[Case]:
    for dtype in FUSED:
        for rows, width in ((5, 8), (5, 160), (7, 2312), (40, 4096), (33, 5120), (5, 11016), (9, 16384)):
            x, residual = draw.randn(rows, width, dtype=dtype), draw.randn(rows, width, dtype=dtype, scale=3)
            weight, inner = draw.randn(width, dtype=dtype), draw.randn(width, dtype=dtype)
            for form in range(16):
                has_residual, has_inner, unit_offset, has_bias = (bool(form >> bit & 1) for bit in range(4))
                step, phase = STEPS[form % 3 == 0]
                normed, hidden = draw.blank(rows, width, dtype=dtype), draw.blank(rows, width, dtype=dtype)
                read = rows_read(rows, step, phase)
                x_sumsq, normed_sumsq = draw.blank(read), draw.blank(read)
                arguments = [normed, hidden, x, residual if has_residual else None, weight, 1e-5]
                arguments += [inner if has_inner else None, 1e-4, unit_offset, weight if has_bias else None]
                arguments += [x_sumsq, normed_sumsq, step, phase]
                outputs = {"normed": normed, "hidden": hidden, "x_sumsq": x_sumsq, "normed_sumsq": normed_sumsq}
                yield "add_rms_norm_", f"{dtype} {rows} x {width}, form {form}", arguments, outputs


def gated_activation_cases(draw: Inputs) -> Iterator[Case]:
    for dtype in FUSED:
        for rows, width in ((5, 8), (5, 160), (7, 2312), (40, 4096), (33, 5120), (5, 14336)):
            gate, up = draw.randn(rows, 2 * width, dtype=dtype, scale=3).chunk(2, dim=1)
            bias = draw.randn(width, dtype=dtype)
            for activation in ("silu", "gelu_tanh"):
                for form, (step, phase) in enumerate((*STEPS, *STEPS)):
                    out = draw.blank(rows, width, dtype=dtype)
                    sums = [draw.blank(rows_read(rows, step, phase)) for _ in range(3)]
                    biases = (bias if form != 1 else None, bias if form > 1 else None)
                    arguments = [out, gate, up, activation, *biases, *sums, step, phase]
                    outputs = {"out": out, **dict(zip(("gate_sumsq", "up_sumsq", "out_sumsq"), sums, strict=True))}
                    what = f"{dtype} {rows} x {width} {activation}, form {form}"
                    yield "gated_activation_", what, arguments, outputs


def rotary_cases(draw: Inputs) -> Iterator[Case]:
    for dtype in FUSED:
        for head_dim, rotary_dim in ((16, 16), (64, 32), (80, 80), (128, 128), (112, 48), (256, 64), (256, 256)):
            for batch, length, q_heads, k_heads in ((1, 3, 1, 1), (2, 7, 6, 2), (2, 40, 33, 5)):
                fused = draw.randn(batch, length, (q_heads + k_heads) * head_dim, dtype=dtype)
                q, k = fused.unflatten(2, (-1, head_dim)).split((q_heads, k_heads), dim=2)
                cos, sin = (draw.randn(batch, length, rotary_dim, dtype=dtype) for _ in range(2))
                power_of_two = (head_dim // 16) & (head_dim // 16 - 1) == 0
                for form, (step, phase) in enumerate((*STEPS, *STEPS)):
                    weights = [draw.randn(head_dim, dtype=dtype) if form > 1 and power_of_two else None] * 2
                    biases = [draw.randn(n * head_dim, dtype=dtype) if form % 2 else None for n in (q_heads, k_heads)]
                    outs = [draw.blank(*x.shape, dtype=dtype) for x in (q, k)]
                    sums = [draw.blank(rows_read(batch * length, step, phase)) for _ in range(2)]
                    arguments = [*outs, q, k, cos, sin, *weights, 1e-5, form == 3, *biases, *sums, step, phase]
                    outputs = dict(zip(("q_out", "k_out", "q_sumsq", "k_sumsq"), outs + sums, strict=True))
                    heads = f"{q_heads} and {k_heads} heads of {head_dim}, {rotary_dim} rotated"
                    yield "rotary_", f"{dtype} {batch} x {length}, {heads}, form {form}", arguments, outputs


def gated_projection_cases(draw: Inputs) -> Iterator[Case]:
    if draw.device.type != "cuda" or not torch.ops.plop_ext.has_gated_projection(draw.randn(1)):
        return
    shapes = ((1, 8, 8), (5, 64, 128), (130, 72, 200), (300, 1024, 3072), (2048, 4096, 1408), (257, 200, 136))
    for dtype in (torch.bfloat16, torch.float16):
        for rows, in_features, features in shapes:
            x = draw.randn(rows, in_features, dtype=dtype)
            gate, up = (draw.randn(features, in_features, dtype=dtype, scale=in_features**-0.5) for _ in range(2))
            for activation in ("silu", "gelu_tanh"):
                for step, phase in STEPS:
                    out = draw.blank(rows, features, dtype=dtype)
                    sums = [draw.blank(rows_read(rows, step, phase)) for _ in range(3)]
                    arguments = [out, x, gate, up, activation, *sums, step, phase]
                    outputs = {"out": out, **dict(zip(("gate_sumsq", "up_sumsq", "out_sumsq"), sums, strict=True))}
                    what = f"{dtype} {rows} x {in_features} to {features} {activation}, step {step}"
                    yield "gated_projection_", what, arguments, outputs


CASES = (
    row_sumsq_cases,
    row_sumsq_pair_cases,
    gain_totals_cases,
    add_rms_norm_cases,
    gated_activation_cases,
    rotary_cases,
    gated_projection_cases,
)


def record(library: Path, device: torch.device, every: int, output: Path) -> None:
    """Run every `every`-th case with `library` and save their outputs."""
    import plop_ext.ops  # noqa: F401  (defines the schemas; PLOP_PURE_PYTHON keeps it from loading its own library)

    torch.ops.load_library(str(library.resolve()))
    key = device.type.upper()
    if not torch._C._dispatch_has_kernel_for_dispatch_key("plop_ext::row_sumsq_", key):
        raise SystemExit(f"{library} has no {key} kernels")
    found: list[Result] = []
    for cases in CASES:
        for op, what, arguments, outputs in itertools.islice(cases(Inputs(device)), 0, None, every):
            getattr(torch.ops.plop_ext, op).default(*arguments)
            found.append((op, what, {name: tensor.cpu() for name, tensor in outputs.items()}))
    torch.save(found, output)


def compare(before: Sequence[Result], after: Sequence[Result], bounded: Sequence[str]) -> tuple[list[str], list[str]]:
    """One line of a table per op, and what differs too much."""
    assert [case[:2] for case in before] == [case[:2] for case in after]
    rows: dict[str, dict[str, float]] = {}
    bad = []
    for (op, what, first), (_, _, second) in zip(before, after, strict=True):
        row = rows.setdefault(op, {"cases": 0, "elements": 0, "other": 0, "most": 0.0})
        row["cases"] += 1
        for name, old in first.items():
            new = second[name]
            other = old.view(BITS[old.itemsize]) != new.view(BITS[new.itemsize])
            row["elements"] += old.numel()
            if not other.any():
                continue
            sums = name.endswith("sumsq")
            a, b = old[other].double(), new[other].double()
            scale = a.abs() if sums else old.double().abs().max()
            relative = float(((a - b).abs() / scale).nan_to_num(float("inf")).max())
            row["other"] += int(other.sum())
            row["most"] = max(row["most"], relative)
            bound = SUM_BOUND if sums else OUTPUT_STEPS * torch.finfo(old.dtype).eps
            if op not in bounded or relative > bound:
                count = f"{int(other.sum())} of {other.numel()}"
                bad.append(f"{op} {name}, {what}: {count} differ, most by {relative:.1e}")
    lines = ["| op | cases | elements compared | elements that differ | largest relative difference |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for op, row in rows.items():
        most = f"{row['most']:.1e}" if row["other"] else "0"
        lines.append(f"| `{op}` | {row['cases']:.0f} | {row['elements']:.0f} | {row['other']:.0f} | {most} |")
    return lines, bad


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="+", type=Path, metavar="LIBRARY", help="before and after")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--bounded", action="append", default=[], metavar="OP", help="allow bounded differences here")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run every N-th case only")
    parser.add_argument("--record", type=Path, help="run one library and save its outputs here")
    args = parser.parse_args(argv)
    if len(args.libraries) != (2 if args.record is None else 1):
        parser.error("name two libraries, or one with --record")
    if args.record is not None:
        record(args.libraries[0], args.device, args.every, args.record)
        return
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number, library in enumerate(args.libraries):
            command = [sys.executable, "-m", "benchmarks.bitwise_before_after", str(library)]
            command += ["--device", str(args.device), "--every", str(args.every), "--record", f"{folder}/{number}"]
            running.append(subprocess.Popen(command, env={**os.environ, "PLOP_PURE_PYTHON": "1"}))
        if any([process.wait() for process in running]):
            raise SystemExit("a library failed to run")
        before, after = (torch.load(Path(folder, str(number)), weights_only=True) for number in range(2))
    lines, bad = compare(before, after, args.bounded)
    print("\n".join(lines))
    if bad:
        raise SystemExit("\n".join([f"{len(bad)} outputs differ:", *bad[:20]]))


if __name__ == "__main__":
    main()
