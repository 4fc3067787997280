"""`Experiment`: candidates and rows, measured, scheduled, tried and judged."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plop_ext.data import counted_tokens
from plop_ext.errors import InputError
from plop_ext.experiment.candidates import Candidate, mismatch
from plop_ext.experiment.estimate import Estimate, estimate
from plop_ext.experiment.given import Given
from plop_ext.experiment.intervals import Difference, difference
from plop_ext.experiment.journal import TrialJournal, recorded
from plop_ext.experiment.race import Outcome, Standing, Trial, race
from plop_ext.experiment.result import Comparison, ComparisonRow
from plop_ext.experiment.schedule import Schedule, within
from plop_ext.experiment.settings import Settings
from plop_ext.experiment.trial import Finetunes
from plop_ext.experiment.verdict import CONFIDENCE, Finding, Verdict, judge
from plop_ext.progress import progress_bar, span

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Experiment:
    """Candidates that are tuned on validation rows and compared on test rows.

    Args:
        model: Causal language model without adapters, the one that was scored. It is restored after each trial.
        tokenizer: Its tokenizer.
        candidates: The candidates, the reference first.
        given: The rows, and what identifies them.
        settings: The settings.
        adapters: Folder for the finalists' adapters; None keeps none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        candidates: Sequence[Candidate],
        given: Given,
        settings: Settings,
        adapters: Path | None = None,
    ) -> None:
        for candidate in candidates:
            candidate.placement.check_model(model)
        self._model, self._candidates, self._given, self._settings = model, list(candidates), given, settings
        self._adapters, self._parts = adapters, given.parts
        self._trials = Finetunes(model, tokenizer, candidates, given.parts, settings, adapters)

    def forecast(self, on_estimate: Callable[[Estimate], None] | None = None) -> dict[str, Any]:
        """Measure a few steps, choose the schedule, and report what it takes.

        The schedule is the full grid, or the most thorough one within `max_seconds`.

        Args:
            on_estimate: Called with the estimate.

        Returns:
            What the journal fixes before the first trial.

        Raises:
            InputError: If even the smallest schedule takes longer, or the files do not fit on the disk.
        """
        measured, limit = self._trials.measure(), self._settings.max_seconds
        wanted = self._settings.wanted(len(self._candidates))
        schedule = wanted if limit is None else within(limit, wanted, measured.speed)
        largest = 4 * max(candidate.params for candidate in self._candidates)
        on_cuda = self._model.device.type == "cuda"
        expected = estimate(schedule, measured.speed, measured.peak_bytes, on_cuda, largest, self._adapters)
        if on_estimate is not None:
            on_estimate(expected)
        for line in expected.lines():
            logger.info("%s", line)
        return {
            "schedule": schedule.to_dict(),
            "candidates": self._names(),
            "loss_before": measured.test.mean,
            "seconds": expected.seconds,
        }

    def run(
        self, journal: TrialJournal, progress: bool = True, on_estimate: Callable[[Estimate], None] | None = None
    ) -> Comparison:
        """Run the trials that the journal lacks, and judge.

        Args:
            journal: The journal. One without a plan gets that of `forecast`.
            progress: Show progress.
            on_estimate: Called with the estimate before the first trial.

        Raises:
            InputError: If the plan has other candidates, or those of `forecast`.
        """
        plan = journal.plan or journal.start(self.forecast(on_estimate))
        if plan["candidates"] != self._names():
            raise InputError("the journal is of other candidates; resume with the same scores, or start anew")
        schedule = Schedule.from_dict(plan["schedule"])
        labels = [candidate.label for candidate in self._candidates]
        most, seconds = schedule.most_trials(len(labels)), 0.0

        with progress_bar("trials", most, progress) as advance:

            def run(trial: Trial) -> Outcome:
                began = time.monotonic()

                def on_step(step: int, loss: float | None) -> None:
                    so_far = "" if loss is None else f", loss {loss:.4f}"
                    advance(0, note=f"{trial}: step {step} of {trial.steps}{so_far}")

                outcome = self._trials(trial, on_step)
                found = "diverged" if outcome.diverged else f"loss {outcome.loss:.4f}"
                number = f"trial {len(journal) + 1} of {'at most ' * bool(schedule.widen)}{most}"
                advance.say(f"{number}: {trial}: {found}, {span(time.monotonic() - began)}")
                return outcome

            ask = recorded(journal, run)

            def asked(trial: Trial) -> Outcome:
                nonlocal seconds
                outcome = ask(trial)
                seconds += outcome.seconds
                advance(1, note="")
                return outcome

            standings = race(schedule, labels, asked)
        return self._judge(schedule, standings, float(plan["loss_before"]), seconds)

    def _judge(
        self,
        schedule: Schedule,
        standings: Mapping[str, Standing],
        loss_before: float,
        seconds: float,
    ) -> Comparison:
        settings, labels = self._settings, list(standings)
        finalists = [label for label in labels if standings[label].finals and not standings[label].diverged]
        # Of the others the best on the validation rows, which is no choice by the test rows.
        home = min(finalists, key=lambda label: (label != labels[0], standings[label].loss), default=None)
        compared = [label for label in finalists if label != home]
        tokens = [counted_tokens(sample) for sample in self._parts.test]

        def nats(label: str) -> list[tuple[float, ...]]:
            return [standings[label].finals[seed].nats for seed in schedule.seeds]

        # Bonferroni: all intervals together hold with the stated confidence.
        confidence = 1 - (1 - CONFIDENCE) / max(1, len(compared))
        found: dict[str, Difference] = {
            label: difference(nats(label), nats(home), tokens, confidence, settings.seeds[0])
            for label in compared
            if home is not None
        }
        costs = {candidate.label: self._memory(candidate) for candidate in self._candidates}
        findings = [
            Finding(
                candidate.label,
                standings[candidate.label].loss,
                standings[candidate.label].diverged,
                found.get(candidate.label),
                costs[candidate.label] or len(candidate.placement.modules),
                "" if home is None else self._saving(candidate, home, costs),
            )
            for candidate in self._candidates
        ]
        verdict = judge(findings, home, settings.margin)
        rows = tuple(
            _row(candidate, standings[candidate.label], found.get(candidate.label), costs[candidate.label], verdict)
            for candidate in self._candidates
        )
        parts = self._parts
        sizes = {
            "train_samples": len(parts.train),
            "validation_samples": len(parts.validation),
            "test_samples": len(parts.test),
            "test_tokens": sum(tokens),
        }
        adapter = None if verdict.winner is None else self._trials.adapter(verdict.winner)
        return Comparison(
            rows=rows,
            verdict=verdict,
            reference=home,
            loss_before=loss_before,
            max_params=settings.max_params,
            mismatch=mismatch(self._candidates),
            schedule=schedule.to_dict(),
            settings=settings.to_dict() | sizes,
            inputs=self._given.inputs,
            adapter=None if adapter is None else str(adapter),
            seconds=seconds,
        )

    def _names(self) -> list[list[Any]]:
        """Return what tells the candidates apart, ready for JSON."""
        return [[item.label, item.r, *item.placement.modules] for item in self._candidates]

    def _memory(self, candidate: Candidate) -> int | None:
        """Predict the memory that training adds for the longest rows, or None."""
        longest = max(len(sample["input_ids"]) for sample in self._parts.train)
        batch = self._settings.batch_size
        try:
            return candidate.placement.cost(self._model, batch, longest, r=candidate.r).total_bytes
        except InputError:  # a quantized type, whose memory is not predicted
            return None

    def _saving(self, candidate: Candidate, home: str, costs: Mapping[str, int | None]) -> str:
        other = next(item for item in self._candidates if item.label == home)
        parts = []
        own, theirs = costs[candidate.label], costs[home]
        if own is not None and theirs is not None and own < theirs:
            parts.append(f"training adds {100 * (1 - own / theirs):.0f} % less memory")
        if len(candidate.placement.modules) < len(other.placement.modules):
            parts.append(f"{len(candidate.placement.modules)} instead of {len(other.placement.modules)} modules")
        return ", ".join(parts)


def _row(
    candidate: Candidate, standing: Standing, found: Difference | None, memory: int | None, verdict: Verdict
) -> ComparisonRow:
    placement = candidate.placement
    times = [outcome.seconds_per_step for outcome in standing.finals.values()]
    return ComparisonRow(
        label=candidate.label,
        why=candidate.why,
        strategy=placement.strategy,
        types=placement.types,
        modules=len(placement.modules),
        r=candidate.r,
        params=candidate.params,
        memory_bytes=memory,
        tuning=tuple(standing.tuning),
        learning_rate=standing.rate,
        lr_at_edge=standing.at_edge,
        validation_loss=standing.loss if math.isfinite(standing.loss) else math.nan,
        losses=tuple(outcome.loss for outcome in standing.finals.values()),
        difference=found,
        outcome=verdict.outcomes[candidate.label],
        seconds_per_step=statistics.median(times) if times else math.nan,
    )
