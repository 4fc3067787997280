"""Time from a loaded model to a placement: plop_ext with default settings against the published algorithm.

python -m benchmarks.time_to_placement --output benchmarks/results/time_to_placement.json

plop_ext scores with its defaults (weight norms of all modules included), ends by its own stop rule and places; the
clock runs from the call to the chosen module names. The published algorithm, as its script runs it, reads 100 samples
of 256 tokens whatever they say; it is run on all of them, once, in the largest of the batches, where it is fastest.

The model has the shape of a published one. Random weights know nothing of their inputs: every NFN is 1, which plop_ext
refuses to place on. So the weights are given a signal. A trained model's normalized activations are dominated by a few
channels; here every RMSNorm scales `SHARE` of its channels by `BOOST`, which then carry half of the energy, and each
type's weight columns at these channels are scaled by a factor of the type (`ALIGNMENT`): below 1 it looks away from
where its inputs lie, above 1 towards it. Types then differ as they do in trained models, by 0.8 to 1.3, and layers
and samples scatter around that as random weights and random tokens make them. The stop rule gets no help beyond that;
how many samples it took is in the rows. No forward costs more or less for the values of its weights.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import plop_ext
from benchmarks import results
from benchmarks.rivals import PublishedScript
from benchmarks.shapes import SHAPES, build
from benchmarks.timing import summarize
from plop_ext.layers import discover
from plop_ext.scoring.baseline import frobenius_norms

SHARE, BOOST = 1 / 32, 6.0
ALIGNMENT = {"q_proj": 1.4, "k_proj": 1.6, "v_proj": 0.5, "gate_proj": 0.85, "up_proj": 0.7}


def give_signal(model: nn.Module) -> None:
    """Scale channels of the norms and columns of the weights, see above."""
    with torch.no_grad():
        for name, module in model.named_modules():
            leaf = name.rpartition(".")[2]
            weight = getattr(module, "weight", None)
            if leaf in ("input_layernorm", "post_attention_layernorm") and isinstance(weight, Tensor):
                weight[: int(len(weight) * SHARE)] *= BOOST
            elif leaf in ALIGNMENT and isinstance(weight, Tensor):
                weight[:, : int(weight.shape[1] * SHARE)] *= ALIGNMENT[leaf]


def make_batches(samples: int, tokens: int, batch: int, vocab: int) -> list[dict[str, Tensor]]:
    """Return random tokens on the host, where a dataloader leaves them."""
    ids = torch.randint(0, vocab, (samples, tokens), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch)]


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds until the host has the result and the device is done, and the result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    found = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, found


def place(model: nn.Module, data: list[dict[str, Tensor]], **options: Any) -> tuple[plop_ext.Scores, tuple[str, ...]]:
    """Return what a user calls, down to the modules."""
    scores = plop_ext.score(model, data, progress=False, **options)
    return scores, scores.place().modules


def published(model: nn.Module, data: list[dict[str, Tensor]], device: torch.device) -> list[str]:
    """Return the published algorithm: all batches, then its scores by type."""
    with PublishedScript(model) as hooks, torch.no_grad():
        for batch in data:
            model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
            hooks.end()
        found = hooks.type_nfn()
    return sorted(found, key=found.__getitem__)[:3]


def our_row(name: str, seconds: list[float], scores: plop_ext.Scores, batch: int, tokens: int) -> results.Row:
    stop = scores.provenance["stop"]
    return {
        "candidate": name,
        "batch": batch,
        **summarize([value * 1e3 for value in seconds]).row("ms", digits=2),
        "runs": len(seconds),
        "samples": len(scores.sample_ids),
        "tokens": len(scores.sample_ids) * tokens,
        "settled": None if stop is None else stop["settled"],
        "types": list(scores.types[:3]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256, help="per sample")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8], help="samples per batch, one row each")
    parser.add_argument("--runs", type=int, default=7, help="of plop_ext, after one that warms up")
    parser.add_argument("--published-samples", type=int, help="fewer than --samples are extrapolated (and marked)")
    args = results.parse(parser, argv)
    if args.quick:
        args.shape, args.samples, args.tokens, args.runs = "tiny", 12, 32, 2
    warnings.simplefilter("ignore")
    cuda = args.device.type == "cuda"
    vocab = SHAPES[args.shape]["vocab_size"]
    model = build(args.shape, device=args.device, dtype=torch.bfloat16 if cuda else torch.float32)
    give_signal(model)
    rows = []
    for batch in args.batches:
        data = make_batches(args.samples, args.tokens, batch, vocab)
        first, _ = timed(partial(place, model, data), args.device)
        runs = [timed(partial(place, model, data), args.device) for _ in range(args.runs)]
        rows.append(our_row("plop_ext", [seconds for seconds, _ in runs], runs[-1][1][0], batch, args.tokens))
        rows[-1]["first_run_ms"] = round(first * 1e3, 2)
    data = make_batches(args.samples, args.tokens, args.batches[0], vocab)
    whole = [timed(partial(place, model, data, stop=None, max_samples=None), args.device) for _ in range(3)]
    every = "plop_ext, all samples"
    rows.append(our_row(every, [seconds for seconds, _ in whole], whole[-1][1][0], args.batches[0], args.tokens))

    read = min(args.published_samples or args.samples, args.samples)
    data = make_batches(args.samples, args.tokens, args.batches[-1], vocab)
    published(model, data[:1], args.device)
    subset = data[: -(-read // args.batches[-1])]
    seconds, types = timed(partial(published, model, subset, args.device), args.device)
    done = sum(len(batch["input_ids"]) for batch in subset)
    rows.append(
        {
            "candidate": "published script",
            "batch": args.batches[-1],
            "ms": round(seconds * args.samples / done * 1e3, 1),
            "runs": 1,
            "samples": args.samples,
            "tokens": args.samples * args.tokens,
            "measured_samples": done,
            "extrapolated": done < args.samples,
            "types": types,
        }
    )
    for row in rows[:-1]:
        row["times_faster"] = round(rows[-1]["ms"] / row["ms"], 1)
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    layers = discover(model).layers
    norms, _ = timed(partial(frobenius_norms, layers), args.device)
    results.save(
        args,
        "time_to_placement",
        rows,
        shape=args.shape,
        samples=args.samples,
        tokens=args.tokens,
        dtype="bf16" if cuda else "fp32",
        modules=len(layers),
        weight_norms_ms=round(norms * 1e3, 2),
        signal={"share": SHARE, "boost": BOOST, "alignment": ALIGNMENT},
    )


if __name__ == "__main__":
    main()
