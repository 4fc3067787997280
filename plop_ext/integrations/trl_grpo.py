"""The data of TRL's `GRPOTrainer`: completions that the model itself writes, as no data set holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plop_ext.errors import SetupError
from plop_ext.integrations.fields import model_fields
from plop_ext.integrations.hf_trainer import check_usable, left_alone
from plop_ext.integrations.trainer_data import TrainerData

__all__ = ["data_of", "left_alone"]


def data_of(trainer: Any, rows: str) -> TrainerData:
    """Return on-policy batches: the trainer generates and rewards completions of its own prompts.

    Raises:
        SetupError: If this release of TRL generates in another way.
    """
    check_usable(trainer)
    if not callable(getattr(trainer, "_generate_and_score_completions", None)):
        import trl

        raise SetupError(
            f"plop_ext does not know how TRL {trl.__version__} generates completions; install trl 0.24 to 1.16"
        )
    return TrainerData(trainer.model, _on_policy(trainer))


def _on_policy(trainer: Any) -> Iterator[dict[str, Any]]:
    model = trainer.model
    for batch in trainer.get_train_dataloader():
        # As in training for TRL, which generates another number of completions for an evaluation; the modules inside
        # stay in eval mode, because dropout would change what is written.
        training, model.training = model.training, True
        try:
            written = trainer._generate_and_score_completions(batch)
        finally:
            model.training = training
        yield model_fields(written)
