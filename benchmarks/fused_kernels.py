"""Bandwidth of the fused ops beside a copy of as many bytes, and beside the separate operators they stand for.

python -m benchmarks.fused_kernels --output benchmarks/results/fused_kernels.json

Bytes are what has to move: each activation read once and written once, and the sums of squares; weights and tables of
angles stay in the cache. The copy moves the same number of bytes, read plus written; `of_copy` is the share of its
speed of the same round, `of_large_copy` that of the speed of a copy of 1 GiB. The rivals do the op's work as
transformers' modules do, without the sums of squares and with them (`row_sumsq_` of each tensor that the op sums).
Their speed counts the op's bytes, so it says how much sooner the op is done, not what their kernels reach.

Tensors rotate among sets that together hold several times the cache. On CUDA the kernels are timed without launches:
as a CUDA graph, or where a call takes long enough, queued behind each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks import results
from benchmarks.fused_cases import CASES, FusedCase, Tensors
from benchmarks.kernel_bandwidth import DTYPES, MIB
from benchmarks.rates import copy_gb_per_s
from benchmarks.timing import Candidate, captured, free, measure, ratios, summarize
from plop_ext import ops

MODELS = ("llama-3.1-8b", "qwen3-0.6b", "qwen3-8b", "gemma-2-9b")
# The other dtypes are measured in one shape.
EVERY_DTYPE = "llama-3.1-8b"
TOKENS = (256, 2048, 8192, 32768)
QUEUED_TOKENS = 32768
OP, MODULES, MODULES_SUMS = "plop_ext", "transformers modules", "transformers modules, row_sumsq_"


def runs(case: FusedCase, rotate_bytes: int, calls: int) -> tuple[dict[str, Callable[[], None]], int]:
    """Return one sweep over all sets of tensors by each candidate, and how many calls it makes."""
    count = max(2, -(-rotate_bytes // case.bytes))
    sets = [case.tensors() for _ in range(count)] * max(1, -(-calls // count))
    half = case.bytes // 2
    pool = torch.randint(-128, 127, (2, count, half), dtype=torch.int8, device=case.device)
    copies = [(pool[0, index % count], pool[1, index % count]) for index in range(len(sets))]

    def copy() -> None:
        for source, target in copies:
            target.copy_(source)

    def sweep(call: Callable[[Tensors], object]) -> None:
        for tensors in sets:
            call(tensors)

    def summed(tensors: Tensors) -> None:
        values = {**tensors, **dict(zip(case.written, case.modules(tensors), strict=True))}
        for name in tensors:
            if name.endswith("_sumsq"):
                x = values[name.removesuffix("_sumsq")]
                ops.row_sumsq_(tensors[name], x.flatten(2) if x.dim() == 4 else x)

    return {
        "copy": copy,
        OP: partial(sweep, case.run),
        MODULES: partial(sweep, case.modules),
        MODULES_SUMS: partial(sweep, summed),
    }, len(sets)


def measure_case(case: FusedCase, large_copy: float, args: argparse.Namespace) -> list[results.Row]:
    cuda = case.device.type == "cuda"
    launch = ("queued" if case.tokens >= QUEUED_TOKENS else "graph") if cuda else "eager"
    found, calls = runs(case, args.rotate_mib * MIB, args.calls)
    if launch == "graph":
        found = {name: captured(run) for name, run in found.items()}  # type: ignore[misc]
    timed = [Candidate(name, lambda _, run=run: run(), queued=cuda) for name, run in found.items()]  # type: ignore[misc]
    seconds = measure(timed, case.device, rounds=args.rounds, warmup=2)
    speeds = {name: [case.bytes * calls / value / 1e9 for value in values] for name, values in seconds.items()}
    rows = []
    for name, values in speeds.items():
        rows.append(
            {
                "op": case.op,
                "model": case.model,
                "shape": case.label,
                "tokens": case.tokens,
                "dtype": next(key for key, value in DTYPES.items() if value == case.dtype),
                "mib": round(case.bytes / MIB, 1),
                "launch": launch,
                "candidate": name,
                "us_per_call": round(summarize(seconds[name]).median / calls * 1e6, 2),
                **summarize(values).row("gb_per_s", 1),
                **ratios(values, speeds["copy"]).row("of_copy", 3),
                "of_large_copy": round(summarize(values).median / large_copy, 3),
            }
        )
    return rows


def work(args: argparse.Namespace) -> list[tuple[str, int, str]]:
    """Model, tokens and dtype of each case."""
    dtypes = {name: list(DTYPES) if name == EVERY_DTYPE else ["bf16"] for name in args.model}
    return [(name, tokens, dtype) for name in args.model for dtype in dtypes[name] for tokens in args.tokens]


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="1024 times n, or fewer")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rotate-mib", type=int, default=512, help="size of all sets of tensors together")
    parser.add_argument("--calls", type=int, default=4, help="of each op in one timing, at least")
    args = results.parse(parser, argv)
    if args.quick:
        args.model, args.tokens, args.rounds, args.rotate_mib, args.calls = ["qwen3-0.6b", "gemma-2-9b"], [16], 2, 1, 2
    large_copy = copy_gb_per_s(args.device, 1 << (30 if args.device.type == "cuda" else 20))
    rows: list[results.Row] = []
    for model, tokens, dtype in work(args):
        for kind in CASES:
            found = measure_case(kind(model, tokens, DTYPES[dtype], args.device), large_copy, args)
            rows += found
            speeds = ", ".join(f"{row['candidate']} {row['gb_per_s']:.0f} ({row['of_copy']:.2f})" for row in found)
            print(f"{dtype} {found[0]['op']} {model} {tokens}, GB/s: {speeds}", flush=True)
            free(args.device)
    results.save(args, "fused_kernels", rows, large_copy_gb_per_s=round(large_copy, 1), rounds=args.rounds)


if __name__ == "__main__":
    main()
