"""Compare placements fairly: equal trainable parameters, each at its own best learning rate, over several seeds."""

from __future__ import annotations

import math
import platform
import random
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from plop_ext.arguments import check_seed, check_whole
from plop_ext.data import Encoded, counted_tokens
from plop_ext.errors import InputError
from plop_ext.finetuning.comparison import Comparison, ComparisonRow
from plop_ext.finetuning.evaluation import learnable
from plop_ext.finetuning.finetune import FinetuneResult, finetune
from plop_ext.progress import progress_bar
from plop_ext.provenance import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from plop_ext.placement import Placement
    from plop_ext.scores import Scores


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
    learning_rates: Sequence[float] = (5e-4, 2e-3, 8e-3),
    seeds: Sequence[int] = (0, 1, 2),
    max_steps: int = 300,
    batch_size: int = 16,
    eval_batch_size: int = 32,
    validation: float = 0.1,
    progress: bool = True,
    on_result: Callable[[ComparisonRow], None] | None = None,
    lora_kwargs: dict[str, Any] | None = None,
) -> Comparison:
    """Finetune with several placements at equal trainable parameters and compare their held-out losses.

    Each placement gets the largest rank that fits `max_params`, with the same `lora_alpha / r` for all. The learning
    rate of each placement is tuned on the grid with the first seed: a run trains on one part of `train` and is
    evaluated on the rest of `train`, never on `eval`. Then one run per seed trains on all of `train` at the best rate.
    (With one learning rate for all placements, the ranking would depend on that rate.) The all-linear placement is
    always included, as the reference. In total there are `len(placements) * (len(learning_rates) + len(seeds))` runs.
    The model is restored afterwards.

    Args:
        model: Causal language model without adapters, the one that was scored.
        tokenizer: Tokenizer of the model.
        scores: Scores of the model, from which the all-linear and the default placements are made.
        train: Samples to train on, from `encode`.
        eval: Held-out samples.
        placements: Placements to compare. Default the lowest three types and, as an ablation, the highest three.
        max_params: Trainable parameters of each placement. Default those of the first placement at rank `r`.
        r: Rank of the first placement if `max_params` is not given.
        alpha_over_r: Scale of the update, `lora_alpha / r`.
        learning_rates: The grid. Widen it if `lr_at_edge` is true in a row.
        seeds: Seeds of the final runs; use at least three to see the spread.
        max_steps: Optimizer steps of each run.
        batch_size: Samples in a step.
        eval_batch_size: Samples in a batch of the held-out loss.
        validation: Share of `train` on which the learning rate is evaluated, above 0 and below 1.
        progress: Show a progress bar.
        on_result: Called with each row as soon as it is complete; the all-linear row is first.
        lora_kwargs: Further arguments of `peft.LoraConfig`.

    Returns:
        The comparison.

    Raises:
        InputError: If an argument is out of range, if a placement is listed twice, or if a placement does not fit
            `max_params` even at rank 1.
    """
    check_whole(r=r, max_params=max_params, alpha_over_r=alpha_over_r, max_steps=max_steps)
    check_whole(batch_size=batch_size, eval_batch_size=eval_batch_size)
    rates, seeds = _grid(learning_rates), _distinct(seeds, "seeds")
    for seed in seeds:
        check_seed(seeds=seed)
    chosen, reference = _with_reference(placements, scores)
    allowed = chosen[0].num_parameters(r) if max_params is None else max_params
    ranks = [placement.rank_for(allowed) for placement in chosen]
    for placement in chosen:
        placement.check_model(model)
    train, eval = learnable(train, "train"), learnable(eval, "eval")
    fitted, judged = _split(train, validation, seeds[0])

    # The bar counts training steps and evaluation batches. The loss without an adapter is measured once per part.
    judging, testing = (-(-len(part) // eval_batch_size) for part in (judged, eval))
    total = len(chosen) * (len(rates) * (max_steps + judging) + len(seeds) * (max_steps + testing)) + judging + testing
    known: dict[str, float] = {}
    rows: dict[int, ComparisonRow] = {}
    with progress_bar("comparing", total, progress) as advance:

        def run(index: int, rate: float, seed: int, tune: bool) -> FinetuneResult:
            note = f"{chosen[index].label}, rate {rate:g}, {'tuning' if tune else f'seed {seed}'}"
            part = "validation" if tune else "held out"
            result = finetune(
                model,
                tokenizer,
                fitted if tune else train,
                judged if tune else eval,
                chosen[index],
                r=ranks[index],
                lora_alpha=alpha_over_r * ranks[index],
                learning_rate=rate,
                max_steps=max_steps,
                batch_size=batch_size,
                eval_batch_size=eval_batch_size,
                seed=seed,
                progress=False,
                on_step=lambda step, loss: advance(note=note),
                on_eval_batch=lambda: advance(note=note),
                loss_before=known.get(part),
                lora_kwargs=lora_kwargs,
            )
            known[part] = result.loss_before
            advance(max_steps - result.steps, note=note)
            return result

        # The reference first, so that every other row can be reported with its differences.
        for index in [reference, *(i for i in range(len(chosen)) if i != reference)]:
            tuning = [(rate, _judge(run(index, rate, seeds[0], True))) for rate in rates]
            best = _best_rate(tuning)
            results = [run(index, best, seed, False) for seed in seeds]
            placement = chosen[index]
            losses = tuple(result.loss_after for result in results)
            others = rows[reference].losses if rows else losses
            rows[index] = ComparisonRow(
                label=placement.label,
                strategy=placement.strategy,
                types=placement.types,
                modules=len(placement.modules),
                r=ranks[index],
                params=results[0].trainable_params,
                learning_rate=best,
                lr_at_edge=best in (rates[0], rates[-1]),
                tuning=tuple(tuning),
                losses=losses,
                differences=tuple(loss - other for loss, other in zip(losses, others, strict=True)),
                seconds_per_step=statistics.median(result.seconds_per_step for result in results),
                diverged=sum(result.diverged for result in results),
            )
            if on_result is not None:
                on_result(rows[index])
    return Comparison(
        rows=tuple(rows[index] for index in range(len(chosen))),
        loss_before=known["held out"],
        max_params=allowed,
        seeds=tuple(seeds),
        learning_rates=tuple(rates),
        settings={
            "max_steps": max_steps,
            "batch_size": batch_size,
            "alpha_over_r": alpha_over_r,
            "train_samples": len(train),
            "validation_samples": len(judged),
            "eval_samples": len(eval),
            "eval_tokens": sum(map(counted_tokens, eval)),
            "model": dict(scores.provenance["model"]),
            "device": _device_name(model.device),
            "versions": dict(versions()),
        },
    )


def _with_reference(placements: Sequence[Placement] | None, scores: Scores) -> tuple[list[Placement], int]:
    """Return the placements and the position of the all-linear one, which is added if it is not among them."""
    chosen = [scores.place(), scores.place(strategy="inverse")] if placements is None else list(placements)
    if not chosen:
        raise InputError("`placements` is empty; give at least one, or leave it out for the default")
    for index, placement in enumerate(chosen):
        for other in chosen[:index]:
            if set(placement.modules) == set(other.modules):
                raise InputError(
                    f"`placements` holds the same modules twice, as {other.label} and {placement.label}; remove one"
                )
    everything = scores.place(strategy="all")
    for index, placement in enumerate(chosen):
        if set(placement.modules) == set(everything.modules):
            return chosen, index
    return [*chosen, everything], len(chosen)


def _grid(learning_rates: Sequence[float]) -> list[float]:
    """Return the learning rates in ascending order."""
    rates = sorted(_distinct(learning_rates, "learning_rates"))
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise InputError(f"`learning_rates` must be above 0, got {', '.join(map(str, rates))}")
    return rates


def _distinct(values: Sequence[Any], name: str) -> list[Any]:
    """Return the values as a list, checked to have no repetitions."""
    if not values or len(set(values)) < len(values):
        raise InputError(f"`{name}` must hold at least one value and none twice, got {list(values)}")
    return list(values)


def _split(train: list[Encoded], share: float, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """Split the training data at random into a part for training and a part for evaluation of the tuning runs."""
    if not 0 < share < 1:
        raise InputError(f"`validation` must be above 0 and below 1, got {share}")
    count = max(1, round(share * len(train)))
    if count >= len(train):
        raise InputError(
            f"`train` has {len(train)} samples with a token to predict, too few to split off `validation`={share};"
            " give more"
        )
    judged = set(random.Random(seed).sample(range(len(train)), count))
    return [s for i, s in enumerate(train) if i not in judged], [train[i] for i in sorted(judged)]


def _judge(result: FinetuneResult) -> float:
    """Return the validation loss of a learning rate, or NaN if the run diverged."""
    return math.nan if result.diverged else result.loss_after


def _best_rate(tuning: Sequence[tuple[float, float]]) -> float:
    """Return the rate with the lowest loss, or the lowest rate if all diverged."""
    usable = [(loss, rate) for rate, loss in tuning if not math.isnan(loss)]
    return min(usable)[1] if usable else min(rate for rate, _ in tuning)


def _device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the kind of CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
