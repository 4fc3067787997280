"""The same samples through the same model, offloaded by accelerate."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import results, timing
from benchmarks.shapes import SHAPES
from plop_ext.collecting.collector import Collector
from plop_ext.forwards.batch import batch_to_device
from plop_ext.layers import discover
from plop_ext.scores import Scores
from plop_ext.scoring.score import score


def offloaded(
    args: argparse.Namespace,
    folder: Path,
    large: Sequence[dict[str, Tensor]],
    small: Sequence[dict[str, Tensor]],
    place: str,
    streamed: Scores,
) -> list[results.Row]:
    """Load the model with accelerate's offload to `place` and score the samples, or the first batches of them.

    Every weight is read once per batch: `large` batches are what offloading is good at, `small` ones are those of the
    streamed run. A batch is started while less than `args.offload_seconds` have passed; the first always.
    """
    import transformers

    layers = SHAPES[args.shape]["num_hidden_layers"]
    home = str(args.device) if args.device.index is not None or args.device.type == "cpu" else "cuda:0"
    device_map = {"model.embed_tokens": home, "model.norm": home, "model.rotary_emb": home, "lm_head": home}
    device_map |= {f"model.layers.{index}": place for index in range(layers)}
    if args.device.type == "cpu" and place == "cpu":
        device_map = {"": "cpu"}
    with tempfile.TemporaryDirectory(dir=folder.parent) as offload:
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        began = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map=device_map, offload_folder=offload
        ).eval()
        loaded = time.perf_counter() - began
        asked = [time.perf_counter()]

        def timed() -> Iterator[dict[str, Tensor]]:
            for batch in large:
                now = time.perf_counter()
                if len(asked) > 1 and now - began > args.offload_seconds:
                    return
                asked.append(now)
                yield batch

        scores = score(model, timed(), max_samples=None, progress=False)
        timing.synchronize(args.device)
        count = len(asked) - 1
        each = (time.perf_counter() - asked[1]) / count
        norms = asked[1] - asked[0]  # reads every weight once, before the first batch
        peak = _peak(args.device)
        small_count, small_each, small_peak = _batch_seconds(model, small[:2], args.device)
        del model
        timing.free(args.device)
    same = streamed.totals.sum_gain[:, : len(scores.sample_ids)].sum(axis=1)
    difference = float(np.abs(scores.totals.sum_gain.sum(axis=1) / same - 1).max())

    def row(data: Sequence[dict[str, Tensor]], count: int, each: float, peak: int | None) -> results.Row:
        size = len(data[0]["input_ids"])
        return {
            "case": f"accelerate, offloaded to {place}",
            "seconds": loaded + norms + each * len(data),
            "batch": size,
            "peak_device": peak,
            "load_seconds": loaded,
            "batches": len(data),
            "batches_run": count,
            "norms_seconds": norms,
            "batch_seconds": each,
            "difference": difference,
        }

    return [row(small, small_count, small_each, small_peak), row(large, count, each, peak)]


def _batch_seconds(
    model: torch.nn.Module, data: Sequence[dict[str, Tensor]], device: torch.device
) -> tuple[int, float, int | None]:
    """Return the number of batches run, seconds of each, and the peak GPU memory; weight norms are not part of it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with Collector(model, discover(model).layers) as collector, torch.no_grad():
        timing.synchronize(device)
        began = time.perf_counter()
        for batch in data:
            collector.begin(len(batch["input_ids"]), batch["attention_mask"])
            model(**batch_to_device(batch, device), use_cache=False, logits_to_keep=1)
            collector.end()
        timing.synchronize(device)
        return len(data), (time.perf_counter() - began) / len(data), _peak(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
