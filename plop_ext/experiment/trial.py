"""The trials themselves: finetunes of the candidates, and the measurement of what they take."""

from __future__ import annotations

import math
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plop_ext.data import Encoded
from plop_ext.errors import SetupError
from plop_ext.experiment.candidates import Candidate
from plop_ext.experiment.given import Parts
from plop_ext.experiment.race import Outcome, Trial
from plop_ext.experiment.schedule import Speed
from plop_ext.experiment.settings import Settings
from plop_ext.finetuning.evaluation import RowLosses, held_out_losses
from plop_ext.finetuning.finetune import FinetuneResult, pad_token_id, train_and_measure

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Steps that are timed; the first, which allocates, is not.
_TIMED_STEPS = 4


@dataclass(frozen=True)
class Measured:
    """What was measured before the first trial.

    Attributes:
        speed: Times of a trial.
        peak_bytes: Peak memory with the longest rows: of the device on CUDA, of the process otherwise.
        validation_loss: Loss of the validation rows without an adapter.
        test: Losses of the test rows without an adapter.
    """

    speed: Speed
    peak_bytes: int
    validation_loss: float
    test: RowLosses


class Finetunes:
    """Runs trials on a model, which is restored after each. Each trial seeds itself.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        candidates: The candidates.
        parts: The rows.
        settings: How to train.
        adapters: Folder for the adapters of the final trials with the first seed; None keeps none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        candidates: Sequence[Candidate],
        parts: Parts,
        settings: Settings,
        adapters: Path | None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._candidates = {candidate.label: candidate for candidate in candidates}
        self._parts, self._settings = parts, settings
        self._adapters = adapters

    def __call__(self, trial: Trial, on_step: Callable[[int, float | None], None] | None = None) -> Outcome:
        """Run a trial."""
        started = time.perf_counter()
        folder = self.adapter(trial.candidate) if trial.final and trial.seed == self._settings.seeds[0] else None
        if folder is not None and folder.exists():  # of a process that was killed before the trial was recorded
            shutil.rmtree(folder)
        parts = self._parts
        result = self._finetune(
            self._candidates[trial.candidate],
            parts.train if trial.final else parts.fitted,
            parts.test if trial.final else parts.validation,
            trial.rate,
            trial.steps,
            trial.seed,
            folder,
            on_step,
        )
        assert result.rows is not None
        return Outcome(
            loss=result.loss_after,
            diverged=result.diverged,
            nats=result.rows.nats if trial.final else (),
            seconds=time.perf_counter() - started,
            seconds_per_step=result.seconds_per_step,
        )

    def adapter(self, label: str) -> Path | None:
        """Return the folder of the adapter of a candidate."""
        if self._adapters is None:
            return None
        number = list(self._candidates).index(label)
        return self._adapters / f"{number}-{re.sub(r'[^A-Za-z0-9_.+-]+', '-', label)}"

    def measure(self) -> Measured:
        """Measure the losses without an adapter, the time of a step of each candidate, and the peak memory."""
        device = self._model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        parts = self._parts
        started = time.perf_counter()
        validation, test = (self._loss(rows) for rows in (parts.validation, parts.test))
        row_seconds = (time.perf_counter() - started) / (len(parts.validation) + len(parts.test))

        longest = sorted(parts.train, key=lambda sample: -len(sample["input_ids"]))[: self._settings.batch_size]
        first = next(iter(self._candidates.values()))
        self._time(first, longest, 1)
        peak = _peak_bytes(device)
        measured = {label: self._time(item, parts.train, _TIMED_STEPS) for label, item in self._candidates.items()}
        speed = Speed(
            step={label: step for label, (step, _) in measured.items()},
            row=row_seconds,
            start=max(start for _, start in measured.values()),
            validation_rows=len(parts.validation),
            test_rows=len(parts.test),
        )
        return Measured(speed, peak, validation.mean, test)

    def _time(self, candidate: Candidate, rows: Sequence[Encoded], steps: int) -> tuple[float, float]:
        """Return the seconds of a step after the first, and those of all that is no step."""
        stamps = [time.perf_counter()]
        shortest = min(self._parts.validation, key=lambda sample: len(sample["input_ids"]))
        self._finetune(
            candidate, rows, [shortest], 1e-5, steps, 0, None, lambda step, loss: stamps.append(time.perf_counter())
        )
        between = [later - earlier for earlier, later in pairwise(stamps[1:])]
        step = statistics.median(between) if between else stamps[1] - stamps[0]
        return step, max(0.0, time.perf_counter() - stamps[0] - step * steps)

    def _loss(self, rows: Sequence[Encoded]) -> RowLosses:
        return held_out_losses(
            self._model,
            rows,
            pad_token_id=pad_token_id(self._tokenizer),
            batch_size=self._settings.eval_batch_size,
        )

    def _finetune(
        self,
        candidate: Candidate,
        train: Sequence[Encoded],
        judged: Sequence[Encoded],
        rate: float,
        steps: int,
        seed: int,
        folder: Path | None,
        on_step: Callable[[int, float | None], None] | None,
    ) -> FinetuneResult:
        settings = self._settings
        try:
            return train_and_measure(
                self._model,
                self._tokenizer,
                train,
                judged,
                candidate.placement,
                r=candidate.r,
                lora_alpha=settings.alpha_over_r * candidate.r,
                learning_rate=rate,
                max_steps=steps,
                batch_size=settings.batch_size,
                eval_batch_size=settings.eval_batch_size,
                seed=seed,
                output_dir=folder,
                on_step=on_step,
                loss_before=math.nan,
                lora_kwargs=settings.lora_kwargs,
            )
        except torch.OutOfMemoryError as error:
            raise SetupError(
                f"out of memory with {candidate.label} at `batch_size` {settings.batch_size}; give a smaller one, or a"
                " smaller `max_length`"
            ) from error


def _peak_bytes(device: torch.device) -> int:
    """Return the peak memory: of the device on CUDA, of the process otherwise, 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
