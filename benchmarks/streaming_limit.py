"""The same model under a hard memory limit, streamed and in memory, and in memory without one."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import limited, results
from benchmarks.make_checkpoint import make
from plop_ext import memory, quantities
from plop_ext.models.checkpoint import Checkpoint
from plop_ext.scores import Scores
from plop_ext.scoring.score import score
from plop_ext.streaming import rates
from plop_ext.streaming.score import score_streaming

ROOT = Path(__file__).resolve().parent.parent


def limit_rows(args: argparse.Namespace, folder: Path) -> tuple[list[results.Row], dict[str, Any]]:
    """Streamed under the limit, in memory under the limit, in memory without one."""
    total = make(args.shape, folder, shard_bytes=args.shard_bytes)
    limit = quantities.size(args.limit, "limit")
    budget = limit - (256 << 20)  # the page cache and the interpreter's children share the limit
    rows, outcomes, kind = [], {}, ""
    # The limit is real: whoever takes more than it is killed, or denied the memory.
    code = f"import numpy; numpy.ones({limit + (64 << 20)}, dtype='uint8')"
    began = time.perf_counter()
    status, kind = limited.run([sys.executable, "-c", code], limit, cwd=ROOT, env=os.environ)
    if status == 0:
        raise SystemExit(f"the limit is not enforced ({kind})")
    row: results.Row = {"case": "an array larger than the limit", "seconds": time.perf_counter() - began}
    rows.append({**row, "exit_status": status})
    for case, how, limited_to in (
        ("streamed", f"{budget}", limit),
        ("in memory", "memory", limit),
        ("in memory, no limit", "memory", None),
    ):
        output = folder.parent / f"{how}-{limited_to}.json"
        words = ["--inside", str(folder), "--how", how, "--scores", str(output), "--shape", args.shape]
        sizes = [f"--{name}={getattr(args, name)}" for name in ("samples", "tokens", "batch")]
        # Pages that are cached already would count for whoever read them first.
        rates.forget_cached(Checkpoint(folder).files)
        command = [sys.executable, "-m", "benchmarks.streaming", "--device", "cpu", *words, *sizes]
        began = time.perf_counter()
        if limited_to is None:
            status = subprocess.run(command, cwd=ROOT).returncode
        else:
            status, kind = limited.run(command, limited_to, cwd=ROOT, env=os.environ)
        row = {"case": case, "seconds": time.perf_counter() - began, "exit_status": status}
        if status == 0:
            outcomes[case] = Scores.load(output)
            row["peak_rss"] = outcomes[case].provenance["peak_rss"]
        rows.append(row)
        print(f"{case}: exit status {status}, {row['seconds']:.0f} s", flush=True)
    streamed, whole = outcomes.get("streamed"), outcomes.get("in memory, no limit")
    if streamed is None or whole is None:
        raise SystemExit("a run that should complete did not")
    return rows, {
        "checkpoint_bytes": total,
        "limit": limit,
        "memory_budget": budget,
        "enforced_by": kind,
        "bitwise_identical": bool(np.array_equal(streamed.totals, whole.totals)),
    }


def inside(args: argparse.Namespace, data: Sequence[dict[str, Tensor]]) -> None:
    """What the limited process does."""
    if args.how == "memory":
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(args.inside, dtype="auto").eval()
        scores = score(model, data, max_samples=None, progress=False)
    else:
        budget = int(args.how)
        scores = score_streaming(args.inside, data, max_samples=None, device="cpu", memory_budget=budget)
    replace(scores, provenance={**scores.provenance, "peak_rss": memory.peak_rss()}).save(args.scores)
