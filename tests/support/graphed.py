"""What tests of graphed forwards share: batches, a run without a limit, and a device to graph on.

Without a GPU a stand-in for the capture repeats the captured work at each replay: all but the capture is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_ext.collecting.totals_queue import TotalsQueue
from plop_ext.forwards import choose
from plop_ext.forwards.graph import capture
from plop_ext.scores import Scores
from plop_ext.scoring.score import score
from tests.support.architectures import ARCHITECTURES
from tests.support.tiny_models import token_batch

Batch = dict[str, Tensor]


class Repeated:
    """In place of `capture.Recorder`: a replay does the work again, on whatever its inputs hold by then."""

    def __init__(self, device: torch.device) -> None:
        self.captured = 0

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        totals = work()
        totals.fill_(torch.nan)  # a capture computes nothing
        self.captured += 1
        return lambda: totals.copy_(work()), totals  # type: ignore[return-value]

    def release(self) -> None:
        pass


@pytest.fixture
def graphing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device on which forwards can be graphed, or seem to be."""
    if device.type == "cpu":
        send = TotalsQueue.send
        monkeypatch.setattr(capture, "Recorder", Repeated)
        monkeypatch.setattr(choose, "check_graph", lambda model: None)
        # What is sent from a device is a copy.
        monkeypatch.setattr(TotalsQueue, "send", lambda self, totals: send(self, totals.clone()))
    return device


def plain(samples: int, tokens: int, seed: int) -> Batch:
    """Unpadded."""
    batch = token_batch([tokens] * samples, seed=seed)
    batch["labels"][:, : tokens // 3 + seed % 3] = -100
    return batch


def padded(samples: int, tokens: int, seed: int) -> Batch:
    batch = token_batch([tokens - (seed + sample) % 5 * (sample > 0) for sample in range(samples)], seed=seed)
    batch["attention_mask"][-1, -1] = 0
    batch["labels"][:, : tokens // 3 + seed % 3] = -100
    return batch


def floats(count: int) -> list[Batch]:
    """For a model of plain PyTorch."""
    return [{"x": torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(i))} for i in range(count)]


def model_on(name: str, device: torch.device) -> nn.Module:
    """In bfloat16: of experts in float32 torch multiplies one after the other, and waits to know how many rows."""
    return ARCHITECTURES[name].build().to(device, torch.bfloat16)


def scored(model: nn.Module, data: Any, **settings: Any) -> Scores:
    return score(model, data, progress=False, **{"max_samples": None, "stop": None, **settings})


def same(first: Scores, second: Scores) -> bool:
    return (
        first.totals.values.tobytes() == second.totals.values.tobytes() and first.nfn.tobytes() == second.nfn.tobytes()
    )
