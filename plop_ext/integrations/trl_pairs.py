"""The data of TRL's `DPOTrainer` and `RewardTrainer`: pairs of a chosen and a rejected completion."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from plop_ext.integrations.fields import model_fields
from plop_ext.integrations.hf_trainer import check_usable, left_alone
from plop_ext.integrations.trainer_data import Mapped, TrainerData

__all__ = ["data_of", "left_alone"]

# Fields of the loss, which no model takes.
_OF_THE_LOSS = ("ref_chosen_logps", "ref_rejected_logps", "margin")


def data_of(trainer: Any, rows: str) -> TrainerData:
    """Return the batches of the trainer's own dataloader, with the chosen or the rejected rows, or both."""
    check_usable(trainer)
    batches = Mapped(trainer.get_train_dataloader(), partial(rows_of, rows=rows))
    return TrainerData(trainer.model, batches)


def rows_of(batch: Mapping[str, Any], rows: str) -> dict[str, Any]:
    """Return the rows of a batch of pairs, whose first half is chosen.

    Args:
        batch: As the trainer's collator makes it. TRL up to 0.29 keeps prompts and both completions apart.
        rows: `"chosen"`, `"rejected"` or `"both"`.
    """
    sides = ("chosen", "rejected") if rows == "both" else (rows,)
    if "prompt_input_ids" in batch:
        parts = [_joined(batch, side) for side in sides]
        length = max(part["input_ids"].shape[1] for part in parts)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        padded = [
            {
                name: torch.nn.functional.pad(value, (0, length - value.shape[1]), value=fill[name])
                for name, value in part.items()
            }
            for part in parts
        ]
        return {name: torch.cat([part[name] for part in padded]) for name in fill}
    fields = {name: value for name, value in model_fields(batch).items() if name not in _OF_THE_LOSS}
    if rows == "both":
        return fields
    pairs = len(fields["input_ids"]) // 2
    kept = slice(0, pairs) if rows == "chosen" else slice(pairs, None)
    return {
        name: value[kept] if isinstance(value, Tensor) and len(value) == 2 * pairs else value
        for name, value in fields.items()
    }


def _joined(batch: Mapping[str, Any], side: str) -> dict[str, Tensor]:
    """Return prompts and the completions of one side as one sequence each."""
    return model_fields(
        {
            "prompt_ids": batch["prompt_input_ids"],
            "prompt_mask": batch["prompt_attention_mask"],
            "completion_ids": batch[f"{side}_input_ids"],
            "completion_mask": batch[f"{side}_attention_mask"],
        }
    )
