"""`run_experiment`: from data to a verdict, in a folder from which a killed run continues."""

from __future__ import annotations

import logging
import os
import random
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plop_ext.arguments import check_choice, check_flags, check_functions, check_type
from plop_ext.data import Encoded, batches
from plop_ext.errors import InputError
from plop_ext.experiment.candidates import Candidate, Entry, match, proposals, reference, without_repetitions
from plop_ext.experiment.engine import Experiment
from plop_ext.experiment.estimate import Estimate
from plop_ext.experiment.given import prepare
from plop_ext.experiment.journal import TrialJournal
from plop_ext.experiment.result import Comparison
from plop_ext.experiment.settings import MARGIN, RATES, SEEDS, Settings
from plop_ext.finetuning.finetune import pad_token_id
from plop_ext.placement.budget import Budget, make_budget
from plop_ext.quantities import count_or_share, size_or_share
from plop_ext.runs.folder import RunFolder, check_folder, open_folder
from plop_ext.scores import Scores
from plop_ext.scoring.score import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_STRATEGIES = ("attention", "mlp", "inverse", "random")
_SCORED_SAMPLES = 128
_SCORING_BATCH = 8


def run_experiment(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Encoded],
    eval: Sequence[Encoded],
    folder: str | os.PathLike[str] | None,
    *,
    strategies: Sequence[str] = (),
    max_params: int | float | str | None = None,
    max_memory: int | float | str | None = None,
    r: int = 16,
    alpha_over_r: int = 2,
    learning_rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
    max_steps: int = 300,
    batch_size: int = 16,
    eval_batch_size: int = 32,
    validation: float = 0.1,
    finalists: int | None = 3,
    widen: int = 2,
    margin: float = MARGIN,
    max_seconds: float | None = None,
    resume: bool = False,
    dry_run: bool = False,
    data_name: str | None = None,
    progress: bool = True,
    on_estimate: Callable[[Estimate], None] | None = None,
    lora_kwargs: dict[str, Any] | None = None,
) -> Comparison | None:
    """Score a model, finetune with the placements that the scores suggest, and keep the one that held-out rows favour.

    The candidates are all-linear (the reference), PLoP's lowest three types, up to two neighbours of that set (types
    whose order at the cut is uncertain), within a budget the placement that the budget allows, and `strategies`. All
    have equally many trainable parameters, as in `compare`, which describes tuning, final and verdict.

    The folder gets `scores.json`, `journal.jsonl` (inputs, schedule, every finished trial), `placement.json` and
    `adapter/` of the winner, `report.html`, and last `result.json`. A killed run loses the trial under way, and
    continues with `resume=True`. On a CPU, equal inputs give equal results to the last bit, also after a kill.

    Args:
        model: Causal language model without adapters. It is restored afterwards.
        tokenizer: Tokenizer of the model.
        train: Samples to train on and to score, from `encode`.
        eval: Test samples. Those that are in `train` too, by a hash of their token ids, are left out.
        folder: New or empty folder; with `resume` one that holds a run of the same inputs. None only with `dry_run`.
        strategies: Further candidates: `"attention"`, `"mlp"`, `"inverse"`, `"random"`.
        max_params: Limit on the trainable parameters: a number, or a fraction of the model's.
        max_memory: Limit on the bytes that training adds for the longest samples: a number, or a fraction of the bytes
            of the model's weights.
        r: Rank of all-linear without a budget.
        alpha_over_r: Scale of the update, `lora_alpha / r`.
        learning_rates: The grid.
        seeds: Seeds of the final trials. The first also draws the samples to score and the validation rows.
        max_steps: Optimizer steps of a trial.
        batch_size: Samples in a step.
        eval_batch_size: Samples in a batch of a held-out loss.
        validation: Share of `train` on which rates and finalists are chosen.
        finalists: Candidates in the final, with all-linear; None for all.
        widen: Number of further rates that are tried for a candidate whose best rate is at an edge of the grid.
        margin: Largest difference, in nats per token, that counts as none.
        max_seconds: Time for all trials; the schedule is shortened to fit before the first.
        resume: Continue a run, or leave a finished one as it is; also starts a new one.
        dry_run: Score, measure a few steps, report the estimate, write nothing, and return None.
        data_name: Name of the data, for the report.
        progress: Show progress.
        on_estimate: Called with the estimate before the first trial.
        lora_kwargs: Further arguments of `peft.LoraConfig`.

    Returns:
        The comparison, with the verdict; None after a dry run.

    Raises:
        InputError: If an argument is out of range, the folder is in use, its run has other inputs, the budget or the
            time is too small, the disk too full, or the data too small.
        SetupError: If memory runs out.
    """
    check_flags(resume=resume, dry_run=dry_run, progress=progress)
    check_functions(on_estimate=on_estimate)
    check_type((str, type(None)), "a name", data_name=data_name)
    settings = Settings(
        learning_rates=learning_rates,
        seeds=seeds,
        max_steps=max_steps,
        finalists=finalists,
        widen=widen,
        margin=margin,
        validation=validation,
        r=r,
        alpha_over_r=alpha_over_r,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        max_seconds=max_seconds,
        lora_kwargs=lora_kwargs,
    )
    wanted = _Wanted(strategies, max_params, max_memory)
    if folder is not None:
        check_folder(folder, resume)
    elif not dry_run:
        raise InputError("`folder` is missing; name a new folder for the run")
    given = prepare(model, tokenizer, train, eval, settings, vars(wanted))
    parts = given.parts

    def experiment_of(scores: Scores, adapters: Path | None) -> tuple[Experiment, list[Candidate]]:
        longest = max(len(sample["input_ids"]) for sample in parts.train)
        budget = make_budget(scores, max_params, max_memory, batch_size, longest)
        candidates = match(_entries(scores, wanted.strategies, budget), r, budget)
        chosen = replace(settings, max_params=None if budget is None else budget.max_params)
        return Experiment(model, tokenizer, candidates, given, chosen, adapters), candidates

    def score_with(journal: Path | None) -> Scores:
        return _score(model, tokenizer, parts.train, seeds[0], data_name, journal, progress)

    if folder is None or dry_run:
        experiment, _ = experiment_of(score_with(None), None if folder is None else Path(folder))
        experiment.forecast(on_estimate)
        return None
    files = open_folder(folder, resume)
    with TrialJournal(files.journal, given.inputs, resume) as journal:
        files.clean()
        if files.result.is_file():
            logger.info("%s is finished and of the same inputs; nothing to do", files.path)
            return Comparison.load(files.result)
        scores = Scores.load(files.scores) if files.scores.is_file() else score_with(files.scoring)
        scores.save(files.scores)
        files.scoring.unlink(missing_ok=True)
        files.adapters.mkdir(exist_ok=True)
        experiment, candidates = experiment_of(scores, files.adapters)
        comparison = experiment.run(journal, progress, on_estimate)
        return _finish(files, scores, comparison, candidates)


@dataclass(frozen=True)
class _Wanted:
    """What a user asks of the candidates; see `run_experiment`."""

    strategies: Sequence[str]
    max_params: int | float | str | None
    max_memory: int | float | str | None

    def __post_init__(self) -> None:
        check_type((list, tuple), f"a list of {', '.join(_STRATEGIES)}", strategies=self.strategies)
        for name in self.strategies:
            check_choice(_STRATEGIES, strategies=name)
        if self.max_params is not None:
            count_or_share(self.max_params, "max_params")
        if self.max_memory is not None:
            size_or_share(self.max_memory, "max_memory")
        object.__setattr__(self, "strategies", list(self.strategies))


def _finish(files: RunFolder, scores: Scores, comparison: Comparison, candidates: Sequence[Candidate]) -> Comparison:
    """Write what the verdict decides; `result.json` is last, so that a kill before it repeats this part alone."""
    files.keep_adapter(None if comparison.adapter is None else Path(comparison.adapter))
    winner = next((item for item in candidates if item.label == comparison.verdict.winner), None)
    kept = files.adapter.name if winner is not None and files.adapter.is_dir() else None
    comparison = replace(comparison, adapter=kept)
    types: tuple[str, ...] = ()
    if winner is not None:
        types = winner.placement.types
        replace(winner.placement, r=winner.r, ranks={}).save(files.placement)
    from plop_ext.report.run_page import write_run_page  # needs rich and jinja2, and importing plop_ext does not

    write_run_page(files.report, scores, comparison, types, _next(files, scores, comparison) if kept else "")
    comparison.save(files.result)
    return comparison


def _next(files: RunFolder, scores: Scores, comparison: Comparison) -> str:
    """Return the line that trains the winner for longer."""
    assert comparison.verdict.winner is not None
    model = scores.provenance["model"].get("name") or "MODEL"
    data = scores.provenance["data"]["name"] or "DATA"
    rate = comparison.row(comparison.verdict.winner).learning_rate
    words = ["plop", "finetune", model, data, "--placement", str(files.placement), "--lr", f"{rate:.3g}"]
    return shlex.join([*words, "--steps", str(5 * comparison.settings["max_steps"]), "-o", "ADAPTER"])


def _entries(scores: Scores, strategies: Sequence[str], budget: Budget | None) -> list[Entry]:
    """Return the candidates, the reference first, each set of modules once."""
    entries = [reference(scores)]
    if budget is not None and scores.placeable:
        chosen = scores.place(
            max_params=budget.max_params, max_memory=budget.max_bytes, batch=budget.batch, seq=budget.seq
        )
        entries.append(Entry(chosen, f"the budget's choice: {chosen.reason or 'the lowest types within it'}"))
    entries += proposals(scores)
    entries += [Entry(scores.place(strategy=name), "asked for") for name in strategies]
    return without_repetitions(entries, asked=False)


def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Encoded],
    seed: int,
    data_name: str | None,
    journal: Path | None,
    progress: bool,
) -> Scores:
    """Score the model on samples of the training rows; the test rows are not read."""
    chosen = sorted(random.Random(seed).sample(range(len(train)), min(_SCORED_SAMPLES, len(train))))
    loader = batches(
        [train[index] for index in chosen], batch_size=_SCORING_BATCH, pad_token_id=pad_token_id(tokenizer)
    )
    return score(model, loader, data_name=data_name, journal=journal, resume=True, seed=seed, progress=progress)
