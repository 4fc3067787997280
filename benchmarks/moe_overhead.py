"""What scoring every expert adds to a forward of a mixture-of-experts model.

python -m benchmarks.moe_overhead --output benchmarks/results/moe_overhead.json

A few layers in the shape of Qwen3-30B-A3B with random weights, so that routing is about even. Beside the plain forward
and scoring runs the forward that scoring observes, with nothing observed: the difference of the two is what observing
costs. Also checks that scoring never synchronizes where the plain forward does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import overhead, results
from benchmarks.shapes import SHAPES, build
from benchmarks.timing import Candidate, measure, time_once
from plop_ext.collecting import routed_experts
from plop_ext.layers.experts import ExpertsAdapter

UNOBSERVED = "the observed forward, not observed"


def candidates(case: overhead.Case) -> list[Candidate]:
    """Return the plain forward, the one that scoring observes, and scoring at every and every 8th token."""
    experts = [layer.module for layer in case.layers if isinstance(layer.adapter, ExpertsAdapter)]

    return [
        Candidate(overhead.PLAIN, lambda _: case.forward()),
        Candidate(
            UNOBSERVED,
            lambda _: case.forward(),
            lambda: routed_experts.observed(dict.fromkeys(experts, lambda hidden, token, expert: None)),
        ),
        *(overhead.scoring_candidate(case, step) for step in (1, 8)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="per sequence")
    parser.add_argument("--rounds", type=int, default=25)
    args = results.parse(parser, argv)
    if args.quick:
        args.shape, args.layers, args.batch, args.tokens, args.rounds = "tiny-moe", 2, 2, 32, 3
    cuda = args.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    model = build(args.shape, {"num_hidden_layers": args.layers}, device=args.device, dtype=dtype)
    case = overhead.make_case(model, SHAPES[args.shape]["vocab_size"], args.batch, args.tokens, args.device)
    experts = sum(isinstance(layer.adapter, ExpertsAdapter) for layer in case.layers)
    print(f"{args.shape}, {args.layers} layers, {args.batch} x {args.tokens} tokens, {experts} expert projections")
    everyone = candidates(case)
    for candidate in everyone[:2] * 2:
        time_once(candidate, args.device)
    memory = {candidate.name: overhead.peak_memory(candidate, args.device) for candidate in everyone}
    seconds = measure(everyone, args.device, rounds=args.rounds, warmup=3, lead=True)
    rows = [overhead.row(name, values, seconds[overhead.PLAIN], memory) for name, values in seconds.items()]
    for row in rows:
        print(f"{row['candidate']}: {row['ms']:.2f} ms, x {row['ratio']:.4f}", flush=True)
    waits = overhead.synchronizations(case) if cuda else None
    results.save(
        args,
        "moe_overhead",
        rows,
        shape=args.shape,
        layers=args.layers,
        batch=args.batch,
        tokens=args.tokens,
        dtype="bf16" if cuda else "fp32",
        modules=len(case.layers),
        expert_projections=experts,
        weight_norms_ms=round(overhead.weight_norm_seconds(case) * 1e3, 2),
        synchronizations=waits,
    )
    print(f"synchronizations: {waits}")
    if waits is not None and any(count > waits[overhead.PLAIN] for count in waits.values()):
        raise SystemExit("scoring synchronized with the device")


if __name__ == "__main__":
    main()
