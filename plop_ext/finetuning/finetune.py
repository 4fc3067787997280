"""Train a LoRA adapter on a placement, and measure its effect on held-out data."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plop_ext.arguments import (
    check_choice,
    check_flags,
    check_functions,
    check_number,
    check_seed,
    check_type,
    check_whole,
    shown,
)
from plop_ext.data import Encoded
from plop_ext.data.held_out import apart
from plop_ext.errors import InputError
from plop_ext.files import check_new_folder, save_or_rescue
from plop_ext.finetuning.evaluation import RowLosses, held_out_losses, learnable, logits_of
from plop_ext.finetuning.record import make_record
from plop_ext.finetuning.saving import check_saved, save_adapter
from plop_ext.finetuning.training import OnStep, train_adapter
from plop_ext.placement.data import PlacementData
from plop_ext.preserve import Snapshot, random_state
from plop_ext.progress import progress_bar
from plop_ext.provenance import describe_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from plop_ext.placement import Placement

logger = logging.getLogger(__name__)

SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")

# A run whose training loss ends above its start by this factor has left the basin of the pretrained weights; the loss
# of single batches scatters by far less.
_DIVERGED_FACTOR = 1.1


@dataclass(frozen=True)
class FinetuneResult:
    """The result of one finetuning run.

    Attributes:
        loss_before: Held-out loss of the model without an adapter, in nats per counted token.
        loss_after: Held-out loss with the trained adapter; NaN if it is not finite.
        trainable_params: Number of trained parameters.
        r: Rank of the adapter.
        learning_rate: Peak learning rate.
        seed: Seed of the run.
        steps: Optimizer steps taken; fewer than `max_steps` if the loss became infinite or NaN.
        seconds: Wall-clock time of the training alone.
        history: Pairs of a step and the mean training loss since the previous pair.
        diverged: Whether a loss was not finite, or the training loss ended over 10 % above its start.
        output_dir: Folder of the adapter, if it was written.
        rows: Loss of each held-out sample with the trained adapter, in the order of the samples that were measured.
        model: The model with its adapter if `keep` was set, otherwise None.
    """

    loss_before: float
    loss_after: float
    trainable_params: int
    r: int
    learning_rate: float
    seed: int
    steps: int
    seconds: float
    history: tuple[tuple[int, float], ...]
    diverged: bool
    output_dir: str | None = None
    rows: RowLosses | None = field(default=None, repr=False)
    model: Any = field(default=None, compare=False, repr=False)

    @property
    def seconds_per_step(self) -> float:
        """Mean wall-clock time of an optimizer step."""
        return self.seconds / max(self.steps, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields except rows and model, ready for JSON: a loss that is not finite becomes None."""
        left_out = ("rows", "model")
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in left_out}
        values |= {name: finite_or_none(values[name]) for name in ("loss_before", "loss_after")}
        return values | {"history": [[step, finite_or_none(loss)] for step, loss in self.history]}


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Encoded],
    eval: Sequence[Encoded],
    placement: Placement,
    *,
    r: int | None = None,
    lora_alpha: int | None = None,
    learning_rate: float = 1e-3,
    max_steps: int = 300,
    batch_size: int = 16,
    eval_batch_size: int = 32,
    warmup_ratio: float = 0.03,
    lr_scheduler: str = "cosine",
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    keep: bool = False,
    progress: bool = True,
    on_step: OnStep | None = None,
    on_eval_batch: Callable[[], None] | None = None,
    loss_before: float | None = None,
    lora_kwargs: dict[str, Any] | None = None,
) -> FinetuneResult:
    """Train a LoRA adapter on the modules of a placement, and measure the held-out loss before and after.

    The model is restored, also after an exception: modules, weights, flags, hooks, and the state of every random
    generator. On CUDA the run is autocast to bfloat16 if the device supports bfloat16. On a CPU, half-precision
    weights are converted to float32 during the run, which is faster on a CPU but doubles their memory. The optimizer
    is AdamW without weight decay; gradients are clipped at norm 1.

    In a process group of torch.distributed, as under torchrun, all ranks call, each with the model on a device of its
    own; the `Trainer` of transformers averages their gradients, and rank 0 writes the adapter.

    Args:
        model: Causal language model without adapters, on one device.
        tokenizer: Tokenizer of the model; only the padding id is read.
        train: Samples to train on, from `encode`; drawn at random, batch by batch, for `max_steps` steps.
        eval: Held-out samples, not used for training. Samples that are in `train` too, by a hash of their token ids,
            are not measured; repetitions are measured once.
        placement: The modules to adapt.
        r: Rank of the adapter on every module; default the placement's own.
        lora_alpha: The update is scaled by `lora_alpha / r`. Default 2 * r; keep the quotient if you change the rank.
        learning_rate: Peak learning rate. The best rate depends on the placement: see `compare`.
        max_steps: Optimizer steps.
        batch_size: Samples in a step, divided among the ranks. Lower it if memory is short.
        eval_batch_size: Samples in a batch of the held-out loss; affects only memory and time.
        warmup_ratio: Share of the steps over which the learning rate rises to its peak.
        lr_scheduler: Schedule after the warm-up: `"cosine"`, `"linear"`, `"constant"` (which has no warm-up) or
            `"constant_with_warmup"`.
        seed: Seed of the adapter's initial weights, the order of the samples and the dropout.
        output_dir: Folder to write the adapter to, new or empty, in PEFT's format, with `result.json` and a card that
            say what it was trained on and what came of it. It is written atomically,
            and not after a run that diverged. If the folder cannot be written after the training, the adapter is
            saved elsewhere, and the error says where. Default none.
        keep: Return the model with the adapter in `FinetuneResult.model`. Then `model` is not restored, because the
            returned model contains it.
        progress: Show progress bars.
        on_step: Called after each step with its number and the latest training loss, if there is one.
        on_eval_batch: Called after each batch of a held-out loss.
        loss_before: Held-out loss without the adapter, if you have measured it already.
        lora_kwargs: Further arguments of `peft.LoraConfig`, such as `lora_dropout` or `use_rslora`.

    Returns:
        The losses, the cost and the history of the run.

    Raises:
        InputError: If an argument is out of range, the model is not a causal language model without adapters,
            every sample of `eval` is in `train` too, `output_dir` is in use, PEFT adapts other modules than
            `placement` names, or the adapter that was written gives other values or logits when it is loaded.
    """
    check_type(PlacementData, "a placement", placement=placement)
    check_whole(r=r)
    check_whole(max_steps=max_steps, batch_size=batch_size, eval_batch_size=eval_batch_size, required=True)
    check_seed(seed=seed)
    check_number(above=0, lora_alpha=lora_alpha, loss_before=loss_before)
    check_number(above=0, learning_rate=learning_rate, required=True)
    check_number(warmup_ratio=warmup_ratio, required=True)
    if not 0 <= warmup_ratio < 1:
        raise InputError(f"`warmup_ratio` must be at least 0 and below 1, got {warmup_ratio}")
    check_choice(SCHEDULERS, lr_scheduler=lr_scheduler)
    check_flags(keep=keep, progress=progress)
    check_type((dict, type(None)), "a dict of fields of LoraConfig", lora_kwargs=lora_kwargs)
    check_functions(on_step=on_step, on_eval_batch=on_eval_batch)
    check_trainable(model, tokenizer)
    placement.check_model(model)
    train = learnable(train, "train")
    eval = apart(train, learnable(eval, "eval"), "eval")
    rank, ranks = rank_and_ranks()
    if batch_size % ranks:
        raise InputError(f"`batch_size` {batch_size} must be a multiple of the number of ranks, {ranks}")
    if output_dir is not None and rank == 0:
        check_new_folder(output_dir, "output_dir")
    result = train_and_measure(
        model,
        tokenizer,
        train,
        eval,
        placement,
        r=r,
        lora_alpha=lora_alpha,
        learning_rate=learning_rate,
        max_steps=max_steps,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        warmup_ratio=warmup_ratio,
        lr_scheduler=lr_scheduler,
        seed=seed,
        output_dir=output_dir,
        keep=keep,
        progress=progress,
        on_step=on_step,
        on_eval_batch=on_eval_batch,
        loss_before=loss_before,
        lora_kwargs=lora_kwargs,
    )
    if result.diverged:
        lost = "; no adapter is written" if output_dir else ""
        logger.warning("%s diverged at learning rate %g%s", placement.label, learning_rate, lost)
    return result


def train_and_measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Encoded],
    eval: Sequence[Encoded],
    placement: Placement,
    *,
    r: int | None,
    lora_alpha: int | None,
    learning_rate: float,
    max_steps: int,
    batch_size: int,
    eval_batch_size: int,
    warmup_ratio: float = 0.03,
    lr_scheduler: str = "cosine",
    seed: int,
    output_dir: str | os.PathLike[str] | None = None,
    keep: bool = False,
    progress: bool = False,
    on_step: OnStep | None = None,
    on_eval_batch: Callable[[], None] | None = None,
    loss_before: float | None = None,
    lora_kwargs: dict[str, Any] | None = None,
) -> FinetuneResult:
    """Do the work of `finetune`, without its checks: many runs on one data set check it once."""
    padding = pad_token_id(tokenizer)

    from peft import get_peft_model
    from transformers import set_seed

    config = placement.lora_config(r=r, lora_alpha=lora_alpha, **{"task_type": "CAUSAL_LM", **(lora_kwargs or {})})
    described = describe_model(model)
    snapshot = Snapshot(model)
    kept = False
    rank, ranks = rank_and_ranks()
    with random_state():
        try:
            if model.device.type == "cpu":
                snapshot.widen()
            measure: dict[str, Any] = {"batch_size": eval_batch_size, "pad_token_id": padding}
            measure |= {"progress": progress, "on_batch": on_eval_batch}
            before = held_out_losses(model, eval, **measure).mean if loss_before is None else loss_before
            set_seed(seed)
            with warnings.catch_warnings():
                # PEFT reads attributes that newer releases of transformers have renamed.
                warnings.simplefilter("ignore", FutureWarning)
                adapted = get_peft_model(model, config)
            placement.verify(adapted)
            snapshot.protect()
            arguments = {
                "learning_rate": learning_rate,
                "max_steps": max_steps,
                "per_device_train_batch_size": batch_size // ranks,
                "warmup_steps": round(warmup_ratio * max_steps),
                "lr_scheduler_type": lr_scheduler,
                "seed": seed,
            }
            with progress_bar("training", max_steps, progress) as advance:
                run = train_adapter(adapted, train, padding, arguments, _reporter(advance, on_step))
            rows = held_out_losses(adapted, eval, **measure)
            after = rows.mean
            diverged = _diverged(run.history, after)
            folder = None if output_dir is None or diverged else str(Path(output_dir).expanduser())
            result = FinetuneResult(
                loss_before=before,
                loss_after=after if math.isfinite(after) else math.nan,
                trainable_params=sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad),
                r=placement.r if r is None else r,
                learning_rate=learning_rate,
                seed=seed,
                steps=run.steps,
                seconds=run.seconds,
                history=run.history,
                diverged=diverged,
                output_dir=folder,
                rows=rows,
                model=adapted.eval() if keep else None,
            )
            if folder is not None and rank == 0:
                settings = {**arguments, "lora_alpha": config.lora_alpha, "lora_kwargs": lora_kwargs or {}}
                record = make_record(described, placement, train, eval, result.to_dict(), settings)
                save_or_rescue(partial(save_adapter, adapted, record), folder)
                check_saved(adapted, folder, lambda: logits_of(adapted, eval[0]))
            kept = keep
            return result
        finally:
            if kept:
                snapshot.restore_types()
                snapshot.restore_config()
            else:
                snapshot.restore()


def rank_and_ranks() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks; 0 and 1 without torch.distributed."""
    import torch

    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def finite_or_none(value: float) -> float | None:
    """Return the number, or None if JSON cannot represent it."""
    return value if math.isfinite(value) else None


def _reporter(advance: Callable[..., None], on_step: OnStep | None) -> OnStep:
    """Return a callback that reports each step to the progress bar and to the caller's callback."""

    def report(step: int, loss: float | None) -> None:
        advance(note="" if loss is None else f"loss {loss:.4f}")
        if on_step is not None:
            on_step(step, loss)

    return report


def check_trainable(model: Any, tokenizer: Any) -> None:
    """Check that the model is a causal language model without adapters, and the tokenizer one of transformers.

    Raises:
        InputError: If they are not.
    """
    if not hasattr(tokenizer, "pad_token_id"):
        raise InputError(f"`tokenizer` must be a tokenizer of transformers, got {shown(tokenizer)}")
    if hasattr(model, "peft_config"):
        raise InputError("`model` has adapters already; give the base model, such as `model.unload()` returns")
    generates = hasattr(model, "can_generate") and model.can_generate()
    if not generates or getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"`model` is no causal language model but a {type(model).__name__}; give one with a head")


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id to pad with; padding is masked, so any valid id works."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None)


def _diverged(history: Sequence[tuple[int, float]], after: float) -> bool:
    """Return whether a run diverged."""
    losses = [loss for _, loss in history]
    if not all(map(math.isfinite, [*losses, after])):
        return True
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) > _DIVERGED_FACTOR * losses[0]
