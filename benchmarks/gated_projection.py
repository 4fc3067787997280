"""The fused MLP products beside cuBLAS': both matrix products of a gated MLP, its activation and the sums of squares.

python -m benchmarks.gated_projection --output benchmarks/results/gated_projection.json

Candidates, each with the same x, weights and outputs: the two matrix products alone (cuBLAS, by torch.mm); these with
`gated_activation_`, what the fast path runs elsewhere; `gated_projection_`. `ratio` is to the second, `tflop_per_s`
counts the operations of the matrix products. A timing repeats the call for `--seconds` behind as long an unmeasured
run, so that each candidate is seen at the clock that it leaves the card at its power limit, as in a forward. The fast
path takes `gated_projection_` from 512 tokens on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import results
from benchmarks.roofline import Widths
from benchmarks.shapes import SHAPES
from benchmarks.timing import Candidate, free, measure, ratios, summarize
from plop_ext import ops

MODELS = ("llama-3.1-8b", "qwen3-0.6b", "qwen3-8b", "gemma-2-9b")
TOKENS = (256, 512, 2048, 8192, 32768)
PRODUCTS, SEPARATE, FUSED = "matrix products", "matrix products, gated_activation_", "gated_projection_"


def runs(model: str, tokens: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """Return the candidates in the shape of `model`, in bfloat16."""
    widths = Widths.of(SHAPES[model])
    k, i = widths.hidden, widths.intermediate
    activation = "gelu_tanh" if SHAPES[model]["model_type"].startswith("gemma") else "silu"
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    x = torch.randn(tokens, k, **like)
    gate_weight, up_weight = (0.02 * torch.randn(i, k, **like) for _ in range(2))
    gate, up, out = (torch.empty(tokens, i, **like) for _ in range(3))
    gate_sumsq, up_sumsq, out_sumsq = (torch.empty(tokens, device=device) for _ in range(3))

    def products() -> None:
        torch.mm(x, gate_weight.T, out=gate)
        torch.mm(x, up_weight.T, out=up)

    def separate() -> None:
        products()
        ops.gated_activation_(out, gate, up, activation, None, None, gate_sumsq, up_sumsq, out_sumsq)

    def fused() -> None:
        ops.gated_projection_(out, x, gate_weight, up_weight, activation, gate_sumsq, up_sumsq, out_sumsq)

    return {PRODUCTS: products, SEPARATE: separate, FUSED: fused}


def measure_case(model: str, tokens: int, device: torch.device, rounds: int, seconds: float) -> list[results.Row]:
    widths = Widths.of(SHAPES[model])
    flop = 4.0 * tokens * widths.hidden * widths.intermediate
    # As many calls for all: what separates them is a few percent.
    calls = max(1, round(seconds * 6.5e14 / flop)) if device.type == "cuda" else 1

    def repeat(run: Callable[[], None], attached: Any) -> None:
        for _ in range(calls):
            run()

    found = runs(model, tokens, device)
    candidates = [Candidate(name, partial(repeat, run), queued=True) for name, run in found.items()]
    taken = measure(candidates, device, rounds=rounds, warmup=1, lead=True)
    return [
        {
            "model": model,
            "shape": f"{widths.hidden} to {widths.intermediate}",
            "tokens": tokens,
            "candidate": name,
            "us_per_call": round(summarize(values).median / calls * 1e6, 2),
            **ratios(values, taken[SEPARATE]).row("ratio", 3),
            "tflop_per_s": round(flop * calls / summarize(values).median / 1e12, 1),
        }
        for name, values in taken.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.15, help="of one timing, about")
    args = results.parse(parser, argv)
    if args.quick:
        args.model, args.tokens, args.rounds, args.seconds = ["qwen3-0.6b"], [16], 2, 0.0
    rows: list[results.Row] = []
    for model in args.model:
        for tokens in args.tokens:
            found = measure_case(model, tokens, args.device, args.rounds, args.seconds)
            rows += found
            figures = ", ".join(f"{row['candidate']} {row['us_per_call']} ({row['ratio']:.3f})" for row in found)
            print(f"{model} {tokens}, us (x): {figures}", flush=True)
            free(args.device)
    results.save(args, "gated_projection", rows, dtype="bf16", rounds=args.rounds, seconds=args.seconds)


if __name__ == "__main__":
    main()
