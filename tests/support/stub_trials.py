"""A stand-in for the finetune of a trial: it answers from a table of losses, at once."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plop_ext.data import Encoded, counted_tokens
from plop_ext.finetuning.evaluation import RowLosses
from plop_ext.finetuning.finetune import FinetuneResult
from plop_ext.placement import Placement


class StubTrials:
    """Takes the place of `train_and_measure`; keeps what it was asked for.

    Args:
        losses: Mean loss by label, or by label and rate; NaN for a trial that diverges. Default 2.
        seed_spread: Standard deviation of the mean loss over seeds.
        row_spread: Standard deviation of the loss of a row over placements.
    """

    def __init__(
        self,
        losses: Mapping[str | tuple[str, float], float] | None = None,
        seed_spread: float = 0.0,
        row_spread: float = 0.0,
    ) -> None:
        self.losses: dict[str | tuple[str, float], float] = dict(losses or {})
        self.seed_spread, self.row_spread = seed_spread, row_spread
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        train: Sequence[Encoded],
        eval: Sequence[Encoded],
        placement: Placement,
        *,
        learning_rate: float,
        seed: int,
        max_steps: int,
        output_dir: Path | None = None,
        on_step: Any = None,
        **options: Any,
    ) -> FinetuneResult:
        call = {"label": placement.label, "rate": learning_rate, "seed": seed, "steps": max_steps, "train": train}
        self.calls.append(call | {"eval": eval, "output_dir": output_dir, **options})
        label = placement.label
        mean = self.losses.get((label, learning_rate), self.losses.get(label, 2.0))
        own = random.Random(zlib.crc32(f"{label} {learning_rate} {seed}".encode()))
        mean += self.seed_spread * own.gauss(0, 1)
        nats = [counted_tokens(sample) * (mean + self.row_spread * own.gauss(0, 1)) for sample in eval]
        rows = RowLosses(tuple(nats), tuple(map(counted_tokens, eval)))
        for step in range(1, max_steps + 1):
            if on_step is not None:
                on_step(step, mean)
        if output_dir is not None and not math.isnan(mean):
            output_dir.mkdir(parents=True)
            (output_dir / "adapter.txt").write_text(f"{label} {learning_rate} {seed}", encoding="utf-8")
        return FinetuneResult(
            loss_before=math.nan,
            loss_after=rows.mean,
            trainable_params=placement.num_parameters(options["r"]),
            r=options["r"],
            learning_rate=learning_rate,
            seed=seed,
            steps=max_steps,
            seconds=0.01 * max_steps,
            history=(),
            diverged=math.isnan(mean),
            rows=rows,
        )
