"""`Experiment`: candidates and rows, measured, scheduled, tried and judged."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from plop_ext.data import Encoded, counted_tokens
from plop_ext.data.held_out import data_hash, distinct, split_off
from plop_ext.errors import InputError
from plop_ext.experiment.candidates import Candidate, mismatch
from plop_ext.experiment.estimate import Estimate, estimate
from plop_ext.experiment.identity import identity
from plop_ext.experiment.intervals import Difference, difference
from plop_ext.experiment.journal import TrialJournal, recorded
from plop_ext.experiment.race import Outcome, Standing, Trial, race
from plop_ext.experiment.result import Comparison, ComparisonRow
from plop_ext.experiment.schedule import Schedule, within
from plop_ext.experiment.settings import Settings
from plop_ext.experiment.trial import Finetunes, Measured, Parts
from plop_ext.experiment.verdict import CONFIDENCE, Finding, Verdict, judge
from plop_ext.progress import progress_bar, span
from plop_ext.provenance import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def divide(train: Sequence[Encoded], test: Sequence[Encoded], validation: float, seed: int) -> Parts:
    """Split validation rows off the training rows; equal rows stay on one side.

    Args:
        train: Training rows, none of which is in `test`.
        test: Test rows.
        validation: Share of the distinct training rows.
        seed: Seed of the split.

    Raises:
        InputError: If there are too few training rows.
    """
    known = len(distinct(train))
    count = max(1, round(validation * known))
    if count >= known:
        raise InputError(
            f"`train` has {known} different samples with a token to predict, too few to split off"
            f" `validation`={validation}; give more"
        )
    fitted, judged = split_off(train, count, seed)
    return Parts(train, fitted, judged, test)


def inputs(
    model: PreTrainedModel, train: Sequence[Encoded], test: Sequence[Encoded], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what must be equal in two runs for equal results, ready for JSON."""
    device = model.device
    return {
        "model": identity(model),
        "training data": data_hash(train),
        "held-out data": data_hash(test),
        "settings": dict(settings),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": dict(versions()),
    }


class Experiment:
    """Candidates that are tuned on validation rows and compared on test rows.

    Args:
        model: Causal language model without adapters, the one that was scored. It is restored after each trial.
        tokenizer: Its tokenizer.
        candidates: The candidates, the reference first.
        parts: The rows.
        settings: The settings.
        adapters: Folder for the finalists' adapters; None keeps none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        candidates: Sequence[Candidate],
        parts: Parts,
        settings: Settings,
        adapters: Path | None = None,
    ) -> None:
        for candidate in candidates:
            candidate.placement.check_model(model)
        self._model, self._candidates, self._parts, self._settings = model, list(candidates), parts, settings
        self._adapters = adapters
        self._trials = Finetunes(
            model, tokenizer, candidates, parts, settings.recipe, adapters, kept_seed=settings.seeds[0]
        )

    def measure(self) -> Measured:
        """Measure the losses without an adapter, and the time and memory of a few steps."""
        return self._trials.measure()

    def schedule(self, measured: Measured, max_seconds: float | None) -> Schedule:
        """Return the full grid, or the most thorough schedule within `max_seconds`.

        Raises:
            InputError: If even the smallest schedule takes longer.
        """
        wanted = self._settings.wanted(len(self._candidates))
        return wanted if max_seconds is None else within(max_seconds, wanted, measured.speed)

    def estimate(self, schedule: Schedule, measured: Measured) -> Estimate:
        """Predict time, memory and disk of a schedule.

        Raises:
            InputError: If the files do not fit on the disk.
        """
        largest = 4 * max(candidate.params for candidate in self._candidates)
        on_cuda = self._model.device.type == "cuda"
        return estimate(schedule, measured.speed, measured.peak_bytes, on_cuda, largest, self._adapters)

    def plan(self, schedule: Schedule, measured: Measured) -> dict[str, Any]:
        """Return what the journal fixes before the first trial."""
        return {
            "schedule": schedule.to_dict(),
            "candidates": self._names(),
            "loss_before": measured.test.mean,
            "seconds": measured.speed.seconds(schedule),
        }

    def run(self, journal: TrialJournal, run_inputs: Mapping[str, Any], progress: bool = True) -> Comparison:
        """Run the trials that the journal lacks, and judge.

        Args:
            journal: The journal, with a plan.
            run_inputs: The inputs of the journal, for the result.
            progress: Show progress.

        Raises:
            InputError: If the plan has other candidates.
        """
        plan = journal.plan
        assert plan is not None
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
        return self._judge(schedule, standings, float(plan["loss_before"]), dict(run_inputs), seconds)

    def _judge(
        self,
        schedule: Schedule,
        standings: Mapping[str, Standing],
        loss_before: float,
        run_inputs: dict[str, Any],
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
            inputs=run_inputs,
            adapter=None if adapter is None else str(adapter),
            seconds=seconds,
        )

    def _names(self) -> list[list[Any]]:
        """Return what tells the candidates apart, ready for JSON."""
        return [[item.label, item.r, *item.placement.modules] for item in self._candidates]

    def _memory(self, candidate: Candidate) -> int | None:
        """Predict the memory that training adds for the longest rows, or None."""
        longest = max(len(sample["input_ids"]) for sample in self._parts.train)
        batch = self._settings.recipe.batch_size
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
