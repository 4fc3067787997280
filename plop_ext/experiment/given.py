"""What an experiment is given: its rows, divided, and what identifies them in a run that continues."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from plop_ext.data import Encoded
from plop_ext.data.held_out import apart, data_hash, distinct, split_off
from plop_ext.errors import InputError
from plop_ext.experiment.identity import identity
from plop_ext.experiment.settings import Settings
from plop_ext.finetuning.evaluation import learnable
from plop_ext.finetuning.finetune import check_trainable, rank_and_ranks
from plop_ext.placement.peft import check_fields
from plop_ext.provenance import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Parts:
    """The rows of an experiment. No row is in two of `fitted`, `validation` and `test`.

    Attributes:
        train: All training rows: final trials train on them.
        fitted: The part of them that tuning trials train on.
        validation: The rest of them, on which rates and finalists are chosen.
        test: Rows that choose nothing; the verdict comes from them.
    """

    train: Sequence[Encoded]
    fitted: Sequence[Encoded]
    validation: Sequence[Encoded]
    test: Sequence[Encoded]


@dataclass(frozen=True)
class Given:
    """The rows, and what must be equal in two runs for equal results.

    Attributes:
        parts: The rows.
        inputs: Model, hashes of the data, settings, device and versions, ready for JSON.
    """

    parts: Parts
    inputs: dict[str, Any]


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Encoded],
    eval: Sequence[Encoded],
    settings: Settings,
    further: Mapping[str, Any] | None = None,
) -> Given:
    """Check and divide what an experiment is given.

    Args:
        model: Causal language model without adapters.
        tokenizer: Its tokenizer.
        train: Training samples; those without a token to predict are dropped.
        eval: Test samples; those that are in `train` too are dropped.
        settings: The settings.
        further: Further settings of the run.

    Raises:
        InputError: If the model cannot be trained, PEFT refuses a field, or there are too few samples.
    """
    if rank_and_ranks()[1] > 1:
        raise InputError(
            "an experiment runs in one process, and torch.distributed has several; start it without torchrun"
        )
    check_trainable(model, tokenizer)
    check_fields(settings.lora_kwargs or {})
    train = learnable(train, "train")
    test = apart(train, learnable(eval, "eval"), "eval")
    device = model.device
    inputs = {
        "model": identity(model),
        "training data": data_hash(train),
        "held-out data": data_hash(test),
        "settings": settings.to_dict() | dict(further or {}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": dict(versions()),
    }
    return Given(_divide(train, test, settings.validation, settings.seeds[0]), inputs)


def _divide(train: Sequence[Encoded], test: Sequence[Encoded], validation: float, seed: int) -> Parts:
    """Split validation rows off the training rows; equal rows stay on one side."""
    known = len(distinct(train))
    count = max(1, round(validation * known))
    if count >= known:
        raise InputError(
            f"`train` has {known} different samples with a token to predict, too few to split off"
            f" `validation`={validation}; give more"
        )
    fitted, judged = split_off(train, count, seed)
    return Parts(train, fitted, judged, test)
