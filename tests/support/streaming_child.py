"""Scores a streamed model in a process of its own, and dies where it is told to: run by the tests of resuming."""

from __future__ import annotations

import os
import signal
import sys

import plop_ext
from plop_ext.streaming import state
from tests.support.tiny_models import token_batch


def main(folder: str, kept: str, output: str, block: int) -> None:
    """Score, and be killed while block `block` is written; never with a negative one."""
    finish = state.State.finish

    def die(self: state.State, index: int, result: dict[str, object], written: bool) -> None:
        if index == block:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, index, result, written)

    state.State.finish = die  # type: ignore[method-assign]
    state.State.is_due = lambda self: True  # type: ignore[method-assign]
    batches = [token_batch([30, 12]), token_batch([17], seed=1)]
    scores = plop_ext.score_streaming(
        folder, batches, device="cpu", state=kept, resume=os.path.isdir(kept), max_samples=None, progress=False
    )
    scores.save(output)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
