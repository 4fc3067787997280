"""What scoring adds to a forward of a full-size model on a GPU, beside plain-PyTorch hooks and the published script.

python -m benchmarks.scoring_overhead --output benchmarks/results/scoring_overhead.json

The model has the shape of a published one and random weights, made on the device; it ends at the last hidden state, as
scoring needs no `lm_head`. Also checks that scoring never synchronizes with the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import overhead, results
from benchmarks.rates import copy_gb_per_s
from benchmarks.shapes import SHAPES, build


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="blocks of the model, default: as published")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="per sequence")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--published-rounds", type=int, default=2, help="it takes seconds each; 0 leaves it out")
    args = results.parse(parser, argv)
    if args.quick:
        args.shape, args.batch, args.tokens, args.rounds, args.published_rounds = "tiny", 2, 32, 3, 1
    cuda = args.device.type == "cuda"
    layers = args.layers or SHAPES[args.shape]["num_hidden_layers"]
    dtype = torch.bfloat16 if cuda else torch.float32
    model = build(args.shape, {"num_hidden_layers": layers}, device=args.device, dtype=dtype)
    copy = copy_gb_per_s(args.device, 1 << (30 if cuda else 20))
    print(f"{args.shape}, {layers} layers, {args.batch} x {args.tokens} tokens; copy {copy:.0f} GB/s", flush=True)
    case = overhead.make_case(model, SHAPES[args.shape]["vocab_size"], args.batch, args.tokens, args.device)
    rows = overhead.measure_case(case, rounds=args.rounds, published_rounds=args.published_rounds)
    read = overhead.read_bytes(case)
    waits = overhead.synchronizations(case) if cuda else None
    plain = rows[0]["ms"]
    result = results.save(
        args,
        "scoring_overhead",
        rows,
        shape=args.shape,
        layers=layers,
        batch=args.batch,
        tokens=args.tokens,
        dtype="bf16" if cuda else "fp32",
        modules=len(case.layers),
        copy_gb_per_s=round(copy, 1),
        activation_bytes=read["shared"],
        activation_bytes_unshared=read["per_module"],
        ratio_by_bytes=round(1 + read["shared"] / copy / 1e6 / plain, 4),
        weight_norms_ms=round(overhead.weight_norm_seconds(case) * 1e3, 2),
        synchronizations=waits,
    )
    settings = result["settings"]
    print(f"one more read of the activations at copy speed: x {settings['ratio_by_bytes']}")
    print(f"weight norms, once per run: {settings['weight_norms_ms']} ms; synchronizations: {waits}")
    if waits is not None and any(count > waits[overhead.PLAIN] for count in waits.values()):
        raise SystemExit("scoring synchronized with the device")


if __name__ == "__main__":
    main()
