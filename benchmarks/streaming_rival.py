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
from plop_ext.scores import Scores
from plop_ext.scoring.score import score


def offloaded(
    args: argparse.Namespace, folder: Path, data: Sequence[dict[str, Tensor]], place: str, streamed: Scores
) -> results.Row:
    """Load the model with accelerate's offload to `place` and score `data`, or the first batches of it.

    Every weight is read once per batch, so that large batches are what offloading is good at. A batch is started while
    less than `args.offload_seconds` have passed; the first always.
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
            for batch in data:
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
        peak = torch.cuda.max_memory_allocated(args.device) if args.device.type == "cuda" else None
        del model
        timing.free(args.device)
    same = streamed.totals[:, : scores.totals.shape[1], 0].sum(axis=1)
    difference = float(np.abs(scores.totals[:, :, 0].sum(axis=1) / same - 1).max())
    return {
        "case": f"accelerate, offloaded to {place}",
        "seconds": loaded + norms + each * len(data),
        "batch": len(data[0]["input_ids"]),
        "peak_device": peak,
        "load_seconds": loaded,
        "batches": len(data),
        "batches_run": count,
        "norms_seconds": norms,
        "batch_seconds": each,
        "difference": difference,
    }
