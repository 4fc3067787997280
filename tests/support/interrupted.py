"""Scores a slow toy model; `tests/scoring/test_journal.py` kills it. Arguments: journal, output, seconds per batch."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from plop_ext.scoring.score import score
from tests.support.tiny_models import Plain

BATCHES = 20


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(3, 11, 16, generator=generator), "sample_ids": torch.arange(3 * i, 3 * i + 3)}
        for i in range(BATCHES)
    ]


def model() -> Plain:
    torch.manual_seed(0)
    return Plain()


def main(journal: str, output: str, pause: float) -> None:
    def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
        time.sleep(pause)
        model(**batch)

    scores = score(
        model(),
        data(),
        max_samples=None,
        token_step=3,
        forward=forward,
        data_name="toy",
        journal=journal,
        resume=True,
        progress=False,
    )
    scores.save(output)
    Path(journal).unlink()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
