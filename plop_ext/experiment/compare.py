"""Compare placements fairly: equal trainable parameters, each at its own best learning rate, over several seeds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from plop_ext.arguments import check_flags, check_functions, check_type
from plop_ext.data import Encoded
from plop_ext.errors import InputError
from plop_ext.experiment.candidates import Entry, match, reference, without_repetitions
from plop_ext.experiment.engine import Experiment
from plop_ext.experiment.estimate import Estimate
from plop_ext.experiment.given import prepare
from plop_ext.experiment.journal import TrialJournal
from plop_ext.experiment.result import Comparison
from plop_ext.experiment.settings import MARGIN, RATES, SEEDS, Settings
from plop_ext.placement.budget import Budget
from plop_ext.placement.data import PlacementData
from plop_ext.scores import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from plop_ext.placement import Placement


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scores: Scores,
    train: Sequence[Encoded],
    eval: Sequence[Encoded],
    placements: Sequence[Placement] | None = None,
    *,
    max_params: int | None = None,
    r: int = 16,
    alpha_over_r: int = 2,
    learning_rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
    max_steps: int = 300,
    batch_size: int = 16,
    eval_batch_size: int = 32,
    validation: float = 0.1,
    finalists: int | None = None,
    widen: int = 2,
    margin: float = MARGIN,
    max_seconds: float | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    on_estimate: Callable[[Estimate], None] | None = None,
    lora_kwargs: dict[str, Any] | None = None,
) -> Comparison:
    """Finetune with several placements at equal trainable parameters, and judge them by their held-out losses.

    The all-linear placement is always included, as the reference. It has rank `r`, or the next higher rank at which
    all others match its trainable parameters within 2 %; all have the same `lora_alpha / r`.

    The learning rate of each placement is tuned on the grid with the first seed: a trial trains on one part of `train`
    and is evaluated on the rest of `train`, never on `eval`. (With one learning rate for all placements, the ranking
    would depend on that rate.) Then the finalists train on all of `train`, once per seed, and are compared with
    all-linear on `eval`, paired by row and by seed. The intervals of all comparisons hold together with 95 %
    confidence. The model is restored afterwards.

    Args:
        model: Causal language model without adapters, the one that was scored.
        tokenizer: Tokenizer of the model.
        scores: Scores of the model, from which the all-linear and the default placements are made.
        train: Samples to train on, from `encode`.
        eval: Held-out samples. Those that are in `train` too, by a hash of their token ids, are left out.
        placements: Placements to compare. Default the lowest three types and, as an ablation, the highest three.
        max_params: Largest number of trainable parameters of each placement, which then gets the largest rank that
            fits. Default those of all-linear at rank `r`.
        r: Rank of all-linear if `max_params` is not given.
        alpha_over_r: Scale of the update, `lora_alpha / r`.
        learning_rates: The grid.
        seeds: Seeds of the final trials. One seed shows no spread and decides nothing; fewer than five give wide
            intervals.
        max_steps: Optimizer steps of each trial.
        batch_size: Samples in a step.
        eval_batch_size: Samples in a batch of the held-out loss.
        validation: Share of `train` on which rates and finalists are chosen, above 0 and below 1.
        finalists: Number of placements in the final, with all-linear; the others are dropped by their validation loss.
            Default all.
        widen: Number of further rates that are tried for a placement whose best rate is at an edge of the grid.
        margin: Largest difference, in nats per token, that counts as none.
        max_seconds: Time for all trials. The schedule is shortened to fit, before the first trial: fewer rates, then
            successive halving, fewer finalists, three seeds, fewer steps. Default no limit.
        journal: File to which every finished trial is appended. Default none.
        resume: Continue from the journal of an interrupted comparison of the same inputs.
        progress: Show a progress bar, or without a terminal a line for each trial and each minute.
        on_estimate: Called before the first trial with an estimate of time and memory, from a few measured steps.
        lora_kwargs: Further arguments of `peft.LoraConfig`.

    Returns:
        The comparison, with its verdict.

    Raises:
        InputError: If an argument is out of range, if a placement is listed twice, if a placement does not fit
            `max_params` even at rank 1, if `max_seconds` is too short, or if the journal is of another run.
    """
    check_flags(resume=resume, progress=progress)
    check_functions(on_estimate=on_estimate)
    check_type(Scores, "scores, such as plop_ext.score returns", scores=scores)
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
        max_params=max_params,
        max_seconds=max_seconds,
        lora_kwargs=lora_kwargs,
    )
    entries = _entries(placements, scores)
    given = prepare(model, tokenizer, train, eval, settings)
    budget = None if settings.max_params is None else Budget(settings.max_params, None, "float32", 1, 1)
    experiment = Experiment(model, tokenizer, match(entries, r, budget), given, settings)
    with TrialJournal(journal, given.inputs, resume) as trials:
        return experiment.run(trials, progress, on_estimate)


def _entries(placements: Sequence[Placement] | None, scores: Scores) -> list[Entry]:
    """Return the reference and the placements, each once."""
    asked = placements is not None
    if placements is not None:
        check_type((list, tuple), "a list of placements", placements=placements)
        for one in placements:
            check_type(PlacementData, "a list of placements", placements=one)
    chosen = list(placements) if placements is not None else [scores.place(), scores.place(strategy="inverse")]
    if not chosen:
        raise InputError("`placements` is empty; give at least one, or leave it out for the default")
    home = reference(scores)
    own = [one for one in chosen if set(one.modules) == set(home.placement.modules)]
    if own:
        home = Entry(own[0], home.why)
    others = [Entry(one, "asked for" if asked else "default") for one in chosen if one not in own[:1]]
    return without_repetitions([home, *others], asked)
