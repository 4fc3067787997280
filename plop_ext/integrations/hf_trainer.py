"""The data of a `Trainer` of transformers, and of TRL's `SFTTrainer`, before the optimizer exists."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from plop_ext.errors import InputError
from plop_ext.integrations.fields import model_fields
from plop_ext.integrations.trainer_data import Mapped, TrainerData

# What preparing a dataloader and generating completions write to a trainer: TRL's means, and its table of completions.
_CHANGED = ("_metrics", "_logs", "_step", "_buffered_inputs")


def data_of(trainer: Any, rows: str) -> TrainerData:
    """Return the batches of the trainer's own dataloader; `rows` has no meaning here.

    Raises:
        InputError: If the training is distributed, or has begun.
    """
    check_usable(trainer)
    return TrainerData(trainer.model, Mapped(trainer.get_train_dataloader(), model_fields))


def check_usable(trainer: Any) -> None:
    """Check that the trainer can be scored.

    Raises:
        InputError: If the training is distributed, or has begun.
    """
    if trainer.args.world_size > 1:
        raise InputError(
            f"`trainer` runs in {trainer.args.world_size} processes, each with other batches, and each would place "
            "LoRA elsewhere; score in one process, and load the placement in all of them"
        )
    if trainer.optimizer is not None and trainer.state.global_step > 0:
        raise InputError(
            "`trainer` has trained already; score before `train()`, or while it trains with `PlopCallback`"
        )


@contextmanager
def left_alone(trainer: Any) -> Iterator[None]:
    """Restore what a dataloader and a generation change in the trainer and its accelerator."""
    accelerator, gradients = trainer.accelerator, trainer.accelerator.gradient_state
    loaders, current = list(accelerator._dataloaders), gradients.dataloader_references
    changed = {name: copy.deepcopy(vars(trainer)[name]) for name in _CHANGED if name in vars(trainer)}
    seen = trainer.state.num_input_tokens_seen
    try:
        yield
    finally:
        accelerator._dataloaders[:] = loaders
        gradients.dataloader_references = current
        vars(trainer).update(changed)
        trainer.state.num_input_tokens_seen = seen
