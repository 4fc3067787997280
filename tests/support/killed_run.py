"""Runs `plop run` on a tiny model in lives that `tests/runs/test_kill.py` ends. Arguments: folder, kills, seed.

The libraries are imported once; each life is a fork, so that most of its time is the run and not the imports.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from plop_ext.data import encode, load_rows
from plop_ext.runs.run import run_experiment
from tests.support.tiny_lm import byte_tokenizer, tiny_llama


def run(folder: Path) -> None:
    """One whole run, or what is left of it."""
    tokenizer = byte_tokenizer()
    train = encode(load_rows("arithmetic", max_samples=24), tokenizer, max_length=96)
    test = encode(load_rows("arithmetic", split="test", max_samples=6), tokenizer, max_length=96)
    run_experiment(
        tiny_llama(num_hidden_layers=1),
        tokenizer,
        train,
        test,
        folder,
        strategies=["mlp"],
        r=2,
        learning_rates=[1e-3, 1e-2],
        seeds=[0, 1],
        max_steps=2,
        batch_size=2,
        finalists=2,
        widen=1,
        max_seconds=1e5,
        resume=True,
        progress=False,
    )


def life(folder: Path, seconds: float | None) -> bool:
    """Run in a fork that is killed after `seconds`; return whether it ended by itself."""
    child = os.fork()
    if child == 0:
        try:
            run(folder)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    ends = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, 0 if ends is None else os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) != 0:
                sys.exit("a life failed")
            return True
        if ends is not None and time.monotonic() >= ends:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.005)


def main(root: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began = time.monotonic()
    life(root / "whole", None)
    whole = time.monotonic() - began
    rng = random.Random(seed)
    number = killed = 0
    current: Any = root / "killed-0"
    while killed < kills:
        if life(current, rng.uniform(0, whole)):
            number += 1
            current = root / f"killed-{number}"
        else:
            killed += 1
    life(current, None)
    print(f"{killed} kills in {number + 1} runs of {whole:.1f} s")
    shutil.rmtree(root / "whole" / "adapters", ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
