"""Every way to score a forward beside the forward itself: eager, compiled, fused, in a CUDA graph, at four sizes.

python -m benchmarks.model_forward --output benchmarks/results/model_forward.json
python -m benchmarks.model_forward --output benchmarks/results/model_forward.json --append \\
    --model llama-3.1-8b --case 8x1024

Models have the shape of published ones and random weights; they end at the last hidden state, run without gradients
and get token ids alone. All candidates of a case run in interleaved rounds on the same weights, each right behind an
unmeasured run of its own, as in a run over many batches; `ratio` is to the plain eager forward of the same round,
`of_compiled`, `of_whole` and `of_graph` are to the plain forward compiled by block, compiled as a whole, and in a CUDA
graph. What comes before the first timing is a figure of its own, `setup_s`: for compiled candidates the compilation,
for graphs warm-up and capture, for the others a first run.

By default each decoder block is compiled, with fixed shapes: one compilation serves all blocks. For the models of
`--whole-model-compile` the forward compiled as a whole, plain and with hooks, runs too where a batch has 8192 tokens
or more: the stronger rival, and a minute of compilation. The published script takes 20 times as long as a forward:
one round, at 8192 tokens and fewer.

`floor_ms` is the roofline of `benchmarks/roofline.py` at the rates measured in this run: the sum over the parts of the
forward of the longer of bytes moved / copy bandwidth and operations / matrix-product rate, and the bytes that the
candidate's scoring reads once more / copy bandwidth. `of_floor` is the measured time over it. Launches are no part of
it.

With stacked experts, hooks and the published script see the other modules only: they do less than plop_ext.

A candidate that cannot run becomes a row with `error`. The result is written after every case, so that a run that is
cut short keeps the cases it finished; `--append` keeps the cases of an earlier run on the same device that this one
does not measure again.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from benchmarks import overhead, results
from benchmarks.overhead import PLAIN, PUBLISHED, Case
from benchmarks.rates import copy_gb_per_s, matmul_tflop_per_s
from benchmarks.roofline import Rates, forward_parts, scoring_bytes
from benchmarks.shapes import SHAPES, build
from benchmarks.timing import Candidate, free, measure, ratios, synchronize
from benchmarks.variants import BASE, COMPILED, COMPILED_WHOLE, PLAIN_GRAPH, VARIANTS, WHOLE, Variant

MODELS = ("llama-3.1-8b", "qwen3-0.6b", "qwen3-8b", "qwen3-30b-a3b")
# All layers would need 60 GB; every layer is alike.
LAYERS = {"qwen3-30b-a3b": 4}
CASES = ((1, 256), (8, 256), (8, 1024), (16, 2048))
WHOLE_MODEL_TOKENS = 8192
PUBLISHED_TOKENS = 8192
KEY = ("model", "batch", "tokens")
# Fields of ratios beside `ratio`, and what they are ratios to.
BASES = {"of_compiled": COMPILED, "of_whole": COMPILED_WHOLE, "of_graph": PLAIN_GRAPH}


@dataclass
class Setup:
    """What setting the candidates of a case up gave.

    Attributes:
        ready: What can be timed.
        seconds: To the end of the first run.
        kept: Bytes of device memory held from then on; None on the CPU.
        notes: Asked after the last run: what the table says beside a candidate.
        errors: Why a candidate cannot run.
    """

    ready: list[Candidate] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    kept: dict[str, int | None] = field(default_factory=dict)
    notes: dict[str, Callable[[], str]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def set_up(variants: Sequence[Variant], case: Case, stack: ExitStack) -> Setup:
    """Start each variant and run it once; what they hold is released with `stack`."""
    device, found = case.input_ids.device, Setup()
    for variant in variants:
        free(device)
        before, began = _held(device, variant.graph), time.perf_counter()
        try:
            with ExitStack() as own:
                ready = own.enter_context(variant.start(case))
                with ready.candidate.attach() as attached:
                    ready.candidate.run(attached)
                synchronize(device)
                found.seconds[variant.name] = time.perf_counter() - began
                found.notes[variant.name] = ready.note
                stack.enter_context(own.pop_all())
        except Exception as error:
            if variant is BASE:
                raise
            found.errors[variant.name] = _one_line(error)
            print(f"{variant.name}: {found.errors[variant.name]}", flush=True)
            continue
        free(device)
        after = _held(device, variant.graph)
        found.kept[variant.name] = None if after is None or before is None else after - before
        found.ready.append(ready.candidate)
    return found


def measure_memory(setup: Setup, device: torch.device) -> dict[str, int | None]:
    """Return the bytes each candidate takes, from its second run; one that cannot run twice moves to the errors."""
    memory: dict[str, int | None] = {}
    for candidate in tuple(setup.ready):
        try:
            peak, kept = overhead.peak_memory(candidate, device), setup.kept[candidate.name]
        except Exception as error:
            if candidate.name == PLAIN:
                raise
            setup.errors[candidate.name] = _one_line(error)
            setup.ready.remove(candidate)
            continue
        memory[candidate.name] = None if peak is None or kept is None else peak + kept
    return memory


def measure_case(
    case: Case, variants: Sequence[Variant], floors: dict[str, float], args: argparse.Namespace
) -> list[results.Row]:
    """Tabulate one row per variant, and one for the published script."""
    device = case.input_ids.device
    rows: list[results.Row] = []
    with ExitStack() as stack:
        setup = set_up(variants, case, stack)
        memory = measure_memory(setup, device)
        # On a GPU the run that measured memory was the warm-up.
        warmup = 0 if device.type == "cuda" else 1
        seconds = measure(
            setup.ready, device, rounds=args.rounds, warmup=warmup, at_least_s=args.seconds_per_case, lead=True
        )
        for variant in variants:
            name = variant.name
            if name in setup.errors:
                rows.append({"candidate": name, "error": setup.errors[name]})
                continue
            row = overhead.row(name, seconds[name], seconds[PLAIN], memory)
            for key, base in BASES.items():
                if base in seconds:
                    row |= ratios(seconds[name], seconds[base]).row(key)
            row["setup_s"] = round(setup.seconds[name], 3)
            row["floor_ms"] = round(floors[name], 4)
            row["of_floor"] = round(row["ms"] / floors[name], 3)
            if note := setup.notes[name]():
                row["note"] = note
            rows.append(row)
    rows.append(published_row(case, memory[PLAIN]))
    for row in rows:
        print(
            f"  {row['candidate']}: " + (f"{row['ms']:.2f} ms, x {row['ratio']:.4f}" if "ms" in row else row["error"])
        )
    return rows


def published_row(case: Case, plain_memory: int | None) -> results.Row:
    """Return one round of the published script beside a plain forward, if it takes seconds and not minutes."""
    if case.input_ids.numel() > PUBLISHED_TOKENS:
        return {
            "candidate": PUBLISHED,
            "error": f"not run: 20 x the forward; see the cases of {PUBLISHED_TOKENS} tokens",
        }
    device = case.input_ids.device
    free(device)
    with BASE.start(case) as base:
        pair = [base.candidate, overhead.published_candidate(case)]
        try:
            memory = {PLAIN: plain_memory, PUBLISHED: overhead.peak_memory(pair[1], device)}
            seconds = measure(pair, device, rounds=1, warmup=0)
        except Exception as error:
            return {"candidate": PUBLISHED, "error": _one_line(error)}
    return overhead.row(PUBLISHED, seconds[PUBLISHED], seconds[PLAIN], memory)


def floors_ms(model: str, layers: int, batch: int, tokens: int, itemsize: int, rates: Rates) -> dict[str, float]:
    """Return the roofline of each variant in milliseconds."""
    config = {**SHAPES[model], "num_hidden_layers": layers}
    forward = sum(part.seconds(rates) for part in forward_parts(config, batch, tokens, itemsize))
    reads = scoring_bytes(config, batch * tokens, itemsize)
    return {
        variant.name: 1e3
        * (forward + (variant.share * reads[variant.reads] / rates.bytes_per_s if variant.reads else 0))
        for variant in (*VARIANTS, *WHOLE)
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--model", choices=SHAPES, action="append", help=f"default: {', '.join(MODELS)}")
    parser.add_argument(
        "--case", type=_case, action="append", metavar="BxT", help="samples x tokens; default: all four"
    )
    parser.add_argument(
        "--layers", type=int, help="blocks of the model, default: as published, 4 of the experts' model"
    )
    parser.add_argument("--rounds", type=int, default=5, help="at least")
    parser.add_argument("--seconds-per-case", type=float, default=12.0, help="more rounds until then")
    parser.add_argument("--whole-model-compile", choices=SHAPES, action="append", default=[], metavar="MODEL")
    results.add_append(parser)
    args = results.parse(parser, argv)
    if args.quick:
        args.model, args.case, args.rounds, args.seconds_per_case = ["tiny", "tiny-moe"], [(2, 32)], 2, 0.0
    earlier = results.earlier(args, parser)
    cuda = args.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    copy = copy_gb_per_s(args.device, 1 << (30 if cuda else 20))
    product = matmul_tflop_per_s(args.device, dtype, 8192 if cuda else 256)
    rates = Rates(copy * 1e9, product * 1e12)
    print(f"copy {copy:.0f} GB/s, matrix product {product:.1f} TFLOP/s", flush=True)
    rows: list[results.Row] = []
    for name in args.model or MODELS:
        layers = args.layers or LAYERS.get(name, SHAPES[name]["num_hidden_layers"])
        model = build(name, {"num_hidden_layers": layers}, device=args.device, dtype=dtype)
        gc.collect()
        gc.freeze()  # what lives as long as the model need not be looked through before every candidate
        for batch, tokens in args.case or CASES:
            print(f"{name}, {layers} layers, {batch} x {tokens} tokens", flush=True)
            began = time.perf_counter()
            whole = name in args.whole_model_compile and (args.quick or batch * tokens >= WHOLE_MODEL_TOKENS)
            case = overhead.make_case(model, SHAPES[name]["vocab_size"], batch, tokens, args.device)
            floors = floors_ms(name, layers, batch, tokens, dtype.itemsize, rates)
            found = measure_case(case, VARIANTS + WHOLE if whole else VARIANTS, floors, args)
            rows += [{"model": name, "layers": layers, "batch": batch, "tokens": tokens, **row} for row in found]
            results.save(
                args,
                "model_forward",
                rows,
                earlier=earlier,
                key=KEY,
                order=lambda row: (list(SHAPES).index(row["model"]), row["batch"] * row["tokens"]),
                dtype="bf16" if cuda else "fp32",
                copy_gb_per_s=round(copy, 1),
                matmul_tflop_per_s=round(product, 2),
            )
            torch._dynamo.reset()  # releases the copies of the model
            print(f"{time.perf_counter() - began:.0f} s", flush=True)
        del model, case
        gc.unfreeze()
        free(args.device)


def _case(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be SAMPLESxTOKENS, such as 8x1024, got {text!r}")
    return int(match[1]), int(match[2])


def _held(device: torch.device, pool: bool) -> int | None:
    """Return the bytes of device memory in use; with `pool` those reserved, including the pool of a CUDA graph."""
    if device.type != "cuda":
        return None
    return torch.cuda.memory_reserved(device) if pool else torch.cuda.memory_allocated(device)


def _one_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."


if __name__ == "__main__":
    main()
