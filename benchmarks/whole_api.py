"""The whole call of `plop_ext.score`, by every way to run its forwards, against plain forwards of the same batches.

python -m benchmarks.whole_api --output benchmarks/results/whole_api.json

The number of samples is given, so no run stops early. A run takes the batches from the host, as a dataloader leaves
them, and everything is on its clock: discovery, weight norms, the checks of the fused kernels on the first batch, the
captures of graphs, and the scores. Beside it are the plain forwards and the best plain-PyTorch hooks of the same run,
which do none of that. Candidates of a case alternate; a ratio is that of the medians.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import plop_ext
from benchmarks import results, timing
from benchmarks.overhead import BEST, PLAIN
from benchmarks.rivals import BestHooks
from benchmarks.shapes import SHAPES, build
from benchmarks.timing import summarize
from plop_ext.layers import discover

FAMILIES = ("llama-3.1-8b", "mistral-7b", "qwen2.5-7b", "gemma-2-9b", "phi-3-mini")
# Samples per batch, tokens per sample, batches.
CASES = ((8, 1024, 12), (4, 256, 24), (1, 256, 64))
# Runs that end after the first or the second batch, as most runs with the default stop rule do.
FEW = (1, 2)
WAYS: dict[str, dict[str, Any]] = {
    "hooks": {"fast": False, "graph": False},
    "fast": {"fast": True, "graph": False},
    "graph": {"fast": False, "graph": True},
    "fast, graph": {"fast": True, "graph": True},
    "default": {},
    "exact": {"exact": True},
}

Batches = list[dict[str, Tensor]]


def make_batches(samples: int, tokens: int, count: int, vocab: int) -> Batches:
    """Return random tokens on the host."""
    ids = torch.randint(0, vocab, (samples * count, tokens), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(samples)]


def plain(model: nn.Module, data: Batches, device: torch.device) -> None:
    with torch.no_grad():
        for batch in data:
            model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)


def best_hooks(model: nn.Module, data: Batches, device: torch.device) -> None:
    modules = {layer.name: layer.module for layer in discover(model).layers}
    with torch.no_grad(), BestHooks(modules, data[0]["input_ids"].numel(), device) as hooks:
        for batch in data:
            model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
            hooks.end()
        hooks.gains()


def score(model: nn.Module, data: Batches, options: dict[str, Any]) -> plop_ext.Scores:
    return plop_ext.score(model, data, max_samples=None, progress=False, **options)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds until the host has the result and the device is done, and the result."""
    timing.synchronize(device)
    began = time.perf_counter()
    result = run()
    timing.synchronize(device)
    return time.perf_counter() - began, result


def same_bits(left: plop_ext.Scores, right: plop_ext.Scores) -> bool:
    return bool(np.array_equal(left.totals.values, right.totals.values, equal_nan=True))


def rows_of(
    family: str, model: nn.Module, case: tuple[int, int, int], ways: dict[str, dict[str, Any]], args: Any
) -> list[results.Row]:
    """Measure every way to run one case."""
    samples, tokens, count = case
    data = make_batches(samples, tokens, count, SHAPES[family]["vocab_size"])
    candidates: dict[str, Callable[[], Any]] = {
        PLAIN: partial(plain, model, data, args.device),
        BEST: partial(best_hooks, model, data, args.device),
        **{name: partial(score, model, data, options) for name, options in ways.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    plain(model, data[:2], args.device)
    if count == max(FEW):  # the kernels of every way are in memory, as in a process that has scored before
        for run in candidates.values():
            run()
    found: dict[str, plop_ext.Scores] = {}
    for _ in range(args.runs):
        for name, run in candidates.items():
            taken, scores = timed(run, args.device)
            seconds[name].append(taken)
            found |= {} if scores is None else {name: scores}
    base, best = (summarize(seconds[name]).median for name in (PLAIN, BEST))
    rows = []
    for name, values in seconds.items():
        row = {"model": family, "batch": samples, "tokens": tokens, "batches": count, "way": name}
        row |= summarize([value * 1e3 for value in values]).row("ms", digits=2)
        middle = summarize(values).median
        row |= {"ratio": round(middle / base, 4), "of_best_hooks": round(middle / best, 4), "runs": args.runs}
        if name in found:
            provenance = found[name].provenance
            row["taken"] = {key: provenance.get(key) for key in ("forward", "fast", "graph")}
            row["same_bits_as"] = [other for other in found if same_bits(found[name], found[other])]
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    results.add_append(parser)
    parser.add_argument("--families", nargs="+", choices=SHAPES, default=list(FAMILIES))
    parser.add_argument("--cases", nargs="+", type=_case, default=list(CASES), metavar="BxTxN")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--runs", type=int, default=3)
    args = results.parse(parser, argv)
    if args.quick:
        args.families, args.cases, args.runs = ["tiny"], [(2, 32, 3)], 1
    cuda = args.device.type == "cuda"
    ways = {name: WAYS[name] for name in args.ways if cuda or not WAYS[name].get("graph")}
    earlier = results.earlier(args, parser)
    warnings.simplefilter("ignore")
    rows = []
    for family in args.families:
        model = build(family, device=args.device, dtype=torch.bfloat16 if cuda else torch.float32)
        for samples, tokens, count in args.cases:
            for batches in (*reversed(FEW), count):
                rows += rows_of(family, model, (samples, tokens, batches), ways, args)
        del model
        timing.free(args.device)
    key = ("model", "batch", "tokens", "batches", "way")
    results.save(args, "whole_api", rows, earlier=earlier, key=key, dtype="bf16" if cuda else "fp32")


def _case(text: str) -> tuple[int, int, int]:
    samples, tokens, batches = (int(part) for part in text.split("x"))
    return samples, tokens, batches


if __name__ == "__main__":
    main()
