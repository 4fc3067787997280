"""What a streamed run is bound by, each measured alone."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.shapes import SHAPES, build
from plop_ext.models.checkpoint import Checkpoint
from plop_ext.models.reader import Reader
from plop_ext.scoring.score import score
from plop_ext.streaming import rates
from plop_ext.streaming.weights import Weights


def read_seconds(weights: Weights, checkpoint: Checkpoint) -> float:
    """Return the seconds to read what a streamed run reads into one buffer in RAM, nothing of it cached before."""
    parts = [weights.outside, *weights.blocks]
    buffer = torch.zeros(max(part.plain_bytes for part in parts), dtype=torch.uint8)
    reader = Reader(torch.device("cpu"))
    rates.forget_cached(checkpoint.files)
    try:
        for part in parts:
            reader.read(part.plain, buffer)
        return reader.seconds
    finally:
        reader.close()


def compute_seconds(args: argparse.Namespace, data: Sequence[dict[str, Tensor]]) -> float:
    """Return the seconds to score the batches with every block resident, from models of two and four blocks.

    Their difference is the time of two blocks: what a run costs whatever its depth (embedding, output head, hooks,
    assembly) is no part of the floor.
    """
    few, many = 2, 4
    seconds = {blocks: _scored_seconds(args, data, blocks) for blocks in (few, many)}
    return (seconds[many] - seconds[few]) / (many - few) * SHAPES[args.shape]["num_hidden_layers"]


def _scored_seconds(args: argparse.Namespace, data: Sequence[dict[str, Tensor]], blocks: int) -> float:
    """Return the shortest of a few runs of a resident model with that many blocks."""
    model = build(args.shape, {"num_hidden_layers": blocks}, device=args.device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(3):
        timing.synchronize(args.device)
        began = time.perf_counter()
        score(model, data, max_samples=None, progress=False)
        timing.synchronize(args.device)
        seconds.append(time.perf_counter() - began)
    del model
    timing.free(args.device)
    return min(seconds)
