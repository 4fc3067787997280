"""Read bandwidth of `row_sumsq_` beside the device's own copy, and of the plain-PyTorch ways to the same numbers.

python -m benchmarks.kernel_bandwidth --output benchmarks/results/kernel_bandwidth.json

Bytes are what has to move: each input element read once, one float32 written per row. The copy counts bytes read plus
bytes written. Inputs rotate among buffers that together hold several times the cache. On CUDA, large inputs are timed
queued behind each other (the kernels alone); small ones twice: as a CUDA graph (the kernels alone) and eager (what a
caller waits for, launch included).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.timing import Candidate, captured, measure, ratios, summarize
from plop_ext import ops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MIB = 1 << 20
Shapes = tuple[tuple[int, int], ...]
# Activations of Llama-3.1-8B (K 4096, 14336, 1024) and Qwen3-0.6B (1024, 2048, 3072) at many and at few tokens; the
# narrow rows of attention heads; and widths that whole rounds of loads do not divide: Qwen2.5-0.5B (896), Gemma-3-1B
# (1152), Qwen3-4B (2560), Llama-2-7B (11008).
UNEVEN = (896, 1152, 2560, 11008)
LARGE: Shapes = (
    *((32768, 4096), (32768, 14336), (131072, 1024), (65536, 2048), (65536, 3072), (1048576, 128), (2097152, 64)),
    *((131072 if features < 2048 else 32768, features) for features in UNEVEN),
)
SMALL: Shapes = (
    *((8192, 4096), (8192, 14336), (8192, 1024), (2048, 4096), (2048, 1024), (256, 4096), (256, 1024)),
    *((2048, features) for features in UNEVEN),
)
QUICK: Shapes = ((512, 1024), (256, 384))


@dataclass(frozen=True)
class Setup:
    """Sizes of a run: the copy's bytes, the bytes the rotating inputs hold together, calls per timing, rounds."""

    copy_bytes: int
    rotate_bytes: int
    calls: int
    rounds: int


def candidates(inputs: Sequence[Tensor], copy: tuple[Tensor, Tensor]) -> dict[str, Callable[[], object]]:
    """Return one sweep over all inputs by each candidate; `copy` is one copy."""
    rows, features = inputs[0].shape
    out = torch.empty(rows, device=inputs[0].device)
    bias = torch.randn(features, device=inputs[0].device).to(inputs[0].dtype)

    def sweep(call: Callable[[Tensor], object]) -> None:
        for x in inputs:
            call(x)

    return {
        "copy": partial(copy[0].copy_, copy[1]),
        "plop_ext": partial(sweep, lambda x: ops.row_sumsq_(out, x)),
        "plop_ext, bias": partial(sweep, lambda x: ops.row_sumsq_(out, x, bias)),
        "vector_norm": partial(sweep, lambda x: torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32, out=out)),
        "float().norm()": partial(sweep, lambda x: x.float().norm(dim=-1)),
    }


def inputs_from(pool: Tensor, rows: int, features: int, setup: Setup) -> list[Tensor]:
    """Inputs one after the other in `pool` that fill `rotate_bytes`, repeated up to the calls of one timing."""
    size = rows * features
    count = max(2, min(pool.numel() // size, setup.rotate_bytes // (size * pool.element_size())))
    views = [pool[i * size : (i + 1) * size].view(rows, features) for i in range(count)]
    return views * max(1, -(-setup.calls // count))


def measure_shape(
    pool: Tensor, copy: tuple[Tensor, Tensor], rows: int, features: int, launch: str, setup: Setup
) -> list[results.Row]:
    inputs = inputs_from(pool, rows, features, setup)
    runs = candidates(inputs, copy)
    if launch == "graph":
        runs = {name: run if name == "copy" else captured(run) for name, run in runs.items()}
    queued = launch != "eager"
    timed = [Candidate(name, lambda _, run=run: run(), queued=queued) for name, run in runs.items()]  # type: ignore[misc]
    seconds = measure(timed, pool.device, rounds=setup.rounds, warmup=2)
    read = rows * features * pool.element_size() + rows * 4
    speeds = {
        name: [(2 * copy[0].nbytes if name == "copy" else read * len(inputs)) / value / 1e9 for value in values]
        for name, values in seconds.items()
    }
    dtype = next(name for name, value in DTYPES.items() if value == pool.dtype)
    found = []
    for name, values in speeds.items():
        call = summarize(seconds[name]).median / (1 if name == "copy" else len(inputs))
        found.append(
            {
                "dtype": dtype,
                "rows": rows,
                "features": features,
                "mib": round(rows * features * pool.element_size() / MIB, 1),
                "launch": launch,
                "candidate": name,
                "us_per_call": round(call * 1e6, 2),
                **summarize(values).row("gb_per_s", 1),
                **ratios(values, speeds["copy"]).row("of_copy", 3),
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=None, help="default 30, on the CPU 5")
    args = results.parse(parser, argv)
    cuda = args.device.type == "cuda"
    large: Shapes
    small: Shapes
    if args.quick:
        setup, large, small = Setup(4 * MIB, 4 * MIB, 2, 2), QUICK, ()
    elif cuda:
        setup, large, small = Setup(1024 * MIB, 256 * MIB, 8, 30), LARGE, SMALL
    else:
        setup, large, small = Setup(256 * MIB, 256 * MIB, 2, 5), SMALL, ()
    if args.rounds is not None:
        setup = Setup(setup.copy_bytes, setup.rotate_bytes, setup.calls, args.rounds)

    copy = tuple(torch.randint(-128, 127, (setup.copy_bytes,), dtype=torch.int8, device=args.device) for _ in range(2))
    work = [(shape, "queued" if cuda else "eager") for shape in large]
    work += [(shape, launch) for shape in small for launch in ("graph", "eager")]
    rows: list[results.Row] = []
    for name in args.dtypes:
        largest = max(r * k for (r, k), _ in work)
        elements = max(2 * largest, setup.rotate_bytes // DTYPES[name].itemsize)
        pool = torch.empty(elements, dtype=DTYPES[name], device=args.device).normal_()
        for (n_rows, features), launch in work:
            found = measure_shape(pool, (copy[0], copy[1]), n_rows, features, launch, setup)
            rows += found
            speeds = ", ".join(f"{row['candidate']} {row['gb_per_s']:.0f}" for row in found)
            print(f"{name} [{n_rows}, {features}] {launch}, GB/s: {speeds}", flush=True)
        del pool
    results.save(args, "kernel_bandwidth", rows, copy_bytes=2 * setup.copy_bytes, rounds=setup.rounds)


if __name__ == "__main__":
    main()
