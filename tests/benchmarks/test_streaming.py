"""The parts of the streaming benchmark that a quick run does not show to be right."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import streaming, streaming_floors, streaming_limit, streaming_rival
from benchmarks.make_checkpoint import make
from plop_ext.scores import Scores
from plop_ext.streaming.score import score_streaming


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("tiny", tmp_path / "model", shard_bytes=100_000)
    return tmp_path / "model"


def test_the_limited_process_saves_its_scores_and_its_peak(folder: Path, tmp_path: Path) -> None:
    data, found = streaming.batches("tiny", 4, 16, 2), []
    for how in ("memory", str(4 << 30)):
        output = tmp_path / f"{how}.json"
        streaming_limit.inside(argparse.Namespace(inside=str(folder), how=how, scores=str(output)), data)
        found.append(Scores.load(output))
        assert found[-1].provenance["peak_rss"] > 0
    np.testing.assert_array_equal(found[0].totals, found[1].totals)


def test_the_compute_floor_counts_blocks_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a run takes 5 s, and 3 s more per block."""
    clock = [0.0]

    def score(model: Any, *_: Any, **__: Any) -> None:
        clock[0] += 5 + 3 * model.config.num_hidden_layers

    monkeypatch.setattr(streaming_floors, "score", score)
    monkeypatch.setattr(streaming_floors.time, "perf_counter", lambda: clock[0])
    args = argparse.Namespace(shape="tiny", device=torch.device("cpu"))
    assert streaming_floors.compute_seconds(args, []) == 2 * 3


@pytest.mark.filterwarnings("ignore:.*counted tokens")
@pytest.mark.parametrize("seconds, ran", [(600, 2), (0, 1)])
def test_offloading_gets_large_batches_and_says_how_many_ran(seconds: float, ran: int, folder: Path) -> None:
    streamed = score_streaming(str(folder), streaming.batches("tiny", 8, 16, 2), device="cpu", progress=False)
    args = argparse.Namespace(shape="tiny", device=torch.device("cpu"), offload_seconds=seconds)
    large, small = (streaming.batches("tiny", 8, 16, size) for size in (4, 2))
    rows = streaming_rival.offloaded(args, folder, large, small, "cpu", streamed)
    assert [(row["batch"], row["batches"], row["batches_run"]) for row in rows] == [(2, 4, 2), (4, 2, ran)]
    for row in rows:
        parts = row["load_seconds"] + row["norms_seconds"] + row["batches"] * row["batch_seconds"]
        assert row["seconds"] == pytest.approx(parts) and row["difference"] < 0.01
