"""Streaming a model from its files: time against what it is bound by, memory, and the same samples offloaded.

python -m benchmarks.streaming --output benchmarks/results/streaming.json                    on a GPU
python -m benchmarks.streaming --limit 4GiB --shape llama-3.2-3b --samples 2 --tokens 64 --batch 1 --device cpu
        --output benchmarks/results/streaming_limit.json

The checkpoint has the shape of a published model and random weights. It fits the machine's page cache, so the cache of
its files is dropped before the disk's floor and before the streamed run, not before the offloaded ones. The floor is
the slowest of three, each measured alone in the same run: reading the same tensors, copying their bytes from pinned
memory, and scoring the same batches with resident blocks of the same shape. Offloading reads every weight once per
batch: it gets the samples in large batches, whose size and memory its row tells, and how many of them ran where the
rest is worked out.

With --limit the model is scored on the CPU by a process that the kernel kills above that memory, and again in memory
without a limit: both must give bitwise identical scores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import results, timing
from benchmarks.make_checkpoint import make
from benchmarks.shapes import SHAPES
from benchmarks.streaming_floors import compute_seconds, read_seconds
from benchmarks.streaming_limit import inside, limit_rows
from benchmarks.streaming_rival import offloaded
from plop_ext.models.checkpoint import Checkpoint
from plop_ext.models.source import find
from plop_ext.streaming import plan, rates, skeleton
from plop_ext.streaming.score import score_streaming
from plop_ext.streaming.weights import Weights

PLANNED = ("llama-3.1-70b", "llama-3.1-405b")


def batches(shape: str, samples: int, tokens: int, size: int) -> list[dict[str, Tensor]]:
    """Return random token ids; the last quarter of every second sample is padding."""
    vocab = SHAPES[shape]["vocab_size"]
    ids = torch.randint(5, vocab, (samples, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1::2, tokens - tokens // 4 :] = 0
    return [
        {"input_ids": ids[at : at + size], "attention_mask": mask[at : at + size]} for at in range(0, samples, size)
    ]


def gpu_rows(args: argparse.Namespace, folder: Path) -> tuple[list[results.Row], dict[str, Any]]:
    """Floors, the streamed run and the offloaded one."""
    data = batches(args.shape, args.samples, args.tokens, args.batch)
    began = time.perf_counter()
    total = make(args.shape, folder, shard_bytes=args.shard_bytes)
    print(f"wrote {total / 1e9:.1f} GB in {time.perf_counter() - began:.0f} s", flush=True)
    checkpoint = Checkpoint(folder)
    model = skeleton.build(find(str(folder)), checkpoint, dtype="auto", device=args.device)
    weights = Weights(model, checkpoint)
    read = weights.outside.stored_bytes + sum(part.stored_bytes for part in weights.blocks)
    block = max(weights.block_bytes(index) for index in range(len(weights.blocks)))

    rows: list[results.Row] = [{"case": "disk read alone", "seconds": read_seconds(weights, checkpoint)}]
    rate = rates.to_device_rate(args.device)
    if rate is not None:
        rows.append({"case": "copy to the device alone", "seconds": read / rate})
    rows.append({"case": "compute alone", "seconds": compute_seconds(args, data)})
    floor = max(rows, key=lambda row: row["seconds"])

    rates.forget_cached(checkpoint.files)
    timing.synchronize(args.device)
    began = time.perf_counter()
    scores = score_streaming(str(folder), data, max_samples=None, device=args.device, progress=not args.quick)
    seconds = time.perf_counter() - began
    took = scores.provenance["streaming"]
    rows.append({"case": "streamed", "seconds": seconds, "peak_device": took["peak_device"]})
    for row in rows:
        print(f"{row['case']}: {row['seconds']:.2f} s, {row['seconds'] / floor['seconds']:.2f} x floor", flush=True)
    # The files are in the page cache by now, and stay there: in favour of offloading.
    large = batches(args.shape, args.samples, args.tokens, args.offload_batch)
    for place in ("cpu", "disk"):
        for row in offloaded(args, folder, large, data, place, scores):
            rows.append(row)
            named = f"{row['case']}, batches of {row['batch']}"
            print(f"{named}: {row['seconds']:.1f} s, largest difference {row['difference']:.1e}", flush=True)
    for row in rows:
        row["of_floor"] = row["seconds"] / floor["seconds"]
        row["times_streamed"] = row["seconds"] / seconds
    peak = took["peak_device"]
    measured = rates.measure(args.device, torch.bfloat16, checkpoint.files)
    return rows, {
        "plans": [plan_of(shape, args, data, measured, folder.parent) for shape in PLANNED],
        "checkpoint_bytes": total,
        "bytes_read": took["bytes_read"],
        "block_bytes": block,
        "floor": floor["case"],
        "peak_device": peak,
        "peak_over_two_blocks": None if peak is None else peak - 2 * block,
        "peak_rss": took["peak_rss"],
        "hidden_kept": took["hidden_kept"],
    }


def plan_of(
    shape: str, args: argparse.Namespace, data: Sequence[dict[str, Tensor]], measured: rates.Rates, folder: Path
) -> dict[str, Any]:
    """Return the plan of a shape that is too large to be made here, for the same batches."""
    make(shape, folder / shape, config_only=True)
    model = skeleton.build(find(str(folder / shape), weights=False), None, dtype="auto", device=args.device)
    figures = plan.make(model, None, [plan.Extent(*batch["input_ids"].shape) for batch in data], args.device)
    return {
        "shape": shape,
        **vars(figures),
        "device_least": figures.device_least,
        "seconds": measured.seconds(figures),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-13b")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=1024, help="per sample, padding included")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--offload-batch", type=int, default=16, help="samples per batch where it is offloaded")
    parser.add_argument("--offload-seconds", type=float, default=15, help="start no further batch offloaded after it")
    parser.add_argument("--shard-bytes", type=int, default=4 << 30)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written for the time of the run")
    parser.add_argument("--limit", help="score on the CPU under this hard memory limit instead")
    for hidden in ("--inside", "--how", "--scores"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = results.parse(parser, argv)
    if args.inside:
        inside(args, batches(args.shape, args.samples, args.tokens, args.batch))
        return
    if args.quick:
        args.shape, args.samples, args.tokens, args.batch, args.shard_bytes = "tiny", 4, 32, 2, 100_000
    with tempfile.TemporaryDirectory(prefix="plop-checkpoint-", dir=args.folder) as name:
        rows, facts = (limit_rows if args.limit else gpu_rows)(args, Path(name) / "model")
    settings = {name: getattr(args, name) for name in ("shape", "samples", "tokens", "batch")}
    results.save(args, "streaming", rows, **settings, **facts)
    if facts.get("bitwise_identical") is False:
        raise SystemExit("the streamed scores differ from those in memory")


if __name__ == "__main__":
    main()
