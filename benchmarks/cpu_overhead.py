"""What scoring adds to a forward on the CPU, beside plain-PyTorch hooks and the published script.

python -m benchmarks.cpu_overhead --output benchmarks/results/cpu_overhead.json

A Llama of 75 M parameters (50 M in its blocks) in float32 on two threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import overhead, results
from benchmarks.shapes import SHAPES, build


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__, device="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="llama-75m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="per sequence")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--published-rounds", type=int, default=3, help="0 leaves it out")
    args = results.parse(parser, argv)
    if args.quick:
        args.shape, args.batch, args.tokens, args.rounds, args.published_rounds = "tiny", 2, 32, 3, 1
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        model = build(args.shape)
        case = overhead.make_case(model, SHAPES[args.shape]["vocab_size"], args.batch, args.tokens, args.device)
        with overhead.scoring(case, fast=True) as (_, forwards):
            report = forwards.report()["fast"]
        rows = overhead.measure_case(
            case,
            rounds=args.rounds,
            published_rounds=args.published_rounds,
            candidates=[overhead.fast_candidate(case)] if report["blocks"] else [],
        )
        results.save(
            args,
            "cpu_overhead",
            rows,
            shape=args.shape,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            batch=args.batch,
            tokens=args.tokens,
            dtype="fp32",
            modules=len(case.layers),
            fast_blocks=report["blocks"],
            fast_reason=report["reason"],
            activation_bytes=overhead.read_bytes(case)["shared"],
            weight_norms_ms=round(overhead.weight_norm_seconds(case) * 1e3, 2),
        )
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
