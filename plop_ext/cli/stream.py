"""`plop score --stream`: score a model block by block, or print the plan for it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from plop_ext.cli import options, outputs
from plop_ext.cli.options import console
from plop_ext.errors import InputError

if TYPE_CHECKING:
    import torch

    from plop_ext.scores import Scores
    from plop_ext.streaming.plan import Plan
    from plop_ext.streaming.rates import Rates


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --stream and its options."""
    group = parser.add_argument_group("models that fit neither the device nor the RAM")
    group.add_argument(
        "--stream", action="store_true", help="score one block at a time, straight from the checkpoint's files"
    )
    group.add_argument(
        "--memory-budget",
        default=None,
        metavar="SIZE",
        help="limit on device memory and on RAM, such as 6GiB (default: 80 %% of the free memory)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print the expected memory, bytes read and time, and stop; needs config.json, not the weights",
    )


def check(args: argparse.Namespace) -> None:
    """Check options that need `--stream`, or exclude it."""
    for name in ("memory_budget", "dry_run"):
        if getattr(args, name) and not args.stream:
            raise InputError(f"`--{name.replace('_', '-')}` needs --stream")
    if args.stream and args.compat is not None:
        raise InputError("`--compat` scores the output head, which --stream never reads; leave one of the two out")
    if args.stream and args.fast:
        raise InputError(
            "`--fast` speeds up whole forwards, and --stream waits for the disk; leave one of the two out"
        )
    if args.stream and args.graph:
        raise InputError(
            "`--graph` replays whole forwards, and --stream runs them block by block; leave one of the two out"
        )
    if args.stream and args.stop == "settled":
        raise InputError(
            "`--stop` ends a run between two batches, and --stream takes all batches through each block; limit them "
            "with --samples"
        )


def score(args: argparse.Namespace, found: Callable[[], None]) -> Scores:
    """Run streamed scoring with the options of `args`; call `found` once the model is known to exist."""
    from plop_ext.data import batches
    from plop_ext.models.architecture import read_config
    from plop_ext.models.code import Trust
    from plop_ext.models.explained import quiet
    from plop_ext.models.tokenizer import load_tokenizer
    from plop_ext.streaming.score import score_streaming, streamed_source

    source, trust = streamed_source(args.model, code=args.trust_remote_code), Trust(args.trust_remote_code)
    found()
    with quiet():
        tokenizer = load_tokenizer(source, read_config(source, trust), trust)
    encoded = options.load_data(args, tokenizer, _samples(args), mask=args.mask)
    return score_streaming(
        args.model,
        batches(
            encoded,
            batch_size=args.batch_size,
            pad_token_id=tokenizer.pad_token_id,
            pad_to_multiple_of=args.pad_to_multiple_of,
        ),
        max_samples=None,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        memory_budget=args.memory_budget,
        state=state_folder(args.output),
        **options.scoring(args),
    )


def state_folder(output: str | None) -> Path | None:
    """Return the folder of the state from which a run with this `output` can be resumed."""
    return outputs.beside(output, ".stream")


def remove_state(output: str) -> None:
    """Remove the state of a run whose scores are saved."""
    from plop_ext.streaming.state import remove

    folder = state_folder(output)
    if folder is not None:
        remove(folder)


def _samples(args: argparse.Namespace) -> int:
    from plop_ext.streaming.score import DEFAULT_SAMPLES

    return DEFAULT_SAMPLES if args.samples is None else int(args.samples)


def peaks_line(streaming: dict[str, Any]) -> str:
    """Return the measured peaks and reads of a run, in one line."""
    from plop_ext.memory import format_size

    parts = [f"peak RAM {format_size(streaming['peak_rss'])}"]
    if streaming["peak_device"] is not None:
        parts.insert(0, f"peak device memory {format_size(streaming['peak_device'])}")
    if streaming["memory_budget"] is not None:
        parts.append(f"budget {format_size(streaming['memory_budget'])}")
    places = [f"{format_size(size)} on {place}" for place, size in streaming["hidden_kept"].items() if size]
    parts.append(f"hidden states: {', '.join(places)}")
    parts.append(f"{format_size(streaming['bytes_read'])} read in {streaming['read_seconds']:.1f} s")
    return "; ".join(parts)


def dry_run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the plan for samples of `--max-length` tokens each, without reading the data, and return its figures."""
    from plop_ext import memory, quantities
    from plop_ext.models.checkpoint import Checkpoint
    from plop_ext.models.code import ask_for_trust
    from plop_ext.models.device import parse_dtype
    from plop_ext.streaming import plan, rates, skeleton
    from plop_ext.streaming.score import run_device, streamed_source
    from plop_ext.streaming.weights import Weights

    samples = _samples(args)
    if samples < 1 or args.batch_size < 1 or args.max_length < 1:
        raise InputError("`--samples`, `--batch-size` and `--max-length` must be at least 1")
    device = run_device(args.device)
    source = streamed_source(args.model, weights=False, code=args.trust_remote_code)
    checkpoint = Checkpoint(source.folder) if any(source.folder.glob("*.safetensors")) else None
    model = skeleton.build(
        source,
        checkpoint,
        trust=ask_for_trust(args.model, source.folder, args.trust_remote_code),
        dtype=parse_dtype(args.dtype),
        device=device,
        include=args.include,
        exclude=args.exclude,
        scope=args.scope,
    )
    sizes = [min(args.batch_size, samples - start) for start in range(0, samples, args.batch_size)]
    extents = [plan.Extent(size, args.max_length) for size in sizes]
    figures = plan.make(model, None if checkpoint is None else Weights(model, checkpoint), extents, device)
    with console.status("measuring the rates of this machine"):
        measured = rates.measure(device, model.dtype, [] if checkpoint is None else checkpoint.files)
    console.print(_plan_table(figures, measured, type(model.model).__name__, device))
    if args.memory_budget is not None:
        held = memory.rss()
        budget = quantities.size(args.memory_budget, "memory_budget")
        on_device, in_ram = figures.rooms(device, budget, held)
        fits = "the device" if figures.hidden <= on_device else "RAM" if figures.hidden <= in_ram else "disk, in part"
        console.print(f"budget {memory.format_size(budget)}: enough; hidden states go to {fits}", highlight=False)
    return {"plan": dataclasses.asdict(figures), "seconds": measured.seconds(figures)}


def _plan_table(figures: Plan, measured: Rates, model: str, device: torch.device) -> Table:
    from plop_ext.memory import format_size, rss

    seconds = measured.seconds(figures)
    slowest = max(seconds, key=lambda name: seconds[name])
    table = Table(title=f"{model} on {device.type}, streamed")
    table.add_column("what")
    table.add_column("figure", justify="right")
    rows = [
        ("blocks", f"{figures.blocks}"),
        ("largest block", format_size(figures.block)),
        ("weights before the first block", format_size(figures.outside)),
        ("bytes read", f"{figures.read / 1e9:.1f} GB"),
        ("tokens, padding included", f"{figures.tokens:,}"),
        ("hidden states of all batches", format_size(figures.hidden)),
        ("activations of one batch, at most", format_size(figures.activations)),
        ("least memory for weights and activations", format_size(figures.device_least)),
        ("least memory budget, this process included", format_size(figures.least(device, rss()))),
        ("disk read, measured", f"{measured.disk / 1e9:.2f} GB/s"),
    ]
    if measured.to_device is not None:
        rows.append(("copy to device, measured", f"{measured.to_device / 1e9:.1f} GB/s"))
    rows.append(("matrix product, measured", f"{measured.flops / 1e12:.2f} TFLOP/s"))
    rows += [(f"{name} alone", _duration(value)) for name, value in seconds.items()]
    rows.append(("expected time", f"{_duration(seconds[slowest])}, limited by {slowest}"))
    for name, figure in rows:
        table.add_row(name, figure)
    return table


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
