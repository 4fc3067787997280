"""Scores on the data of a `Trainer`, before its optimizer exists; TRL's and Lightning's are in their own files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plop_ext
from plop_ext.errors import InputError
from plop_ext.integrations import score_trainer
from tests.support.tiny_lm import tiny_llama
from tests.support.trainings import ROWS, adapted, collate, losses_of, trainer_of


def scored(trainer: object, **options: object) -> plop_ext.Scores:
    return score_trainer(trainer, **{"max_samples": None, "stop": None, "progress": False} | options)


def test_the_training_is_bitwise_that_without_scoring(tmp_path: Path) -> None:
    arguments = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 8}
    expected = losses_of(trainer_of(adapted(), tmp_path, **arguments))
    model = adapted()
    trainer = trainer_of(model, tmp_path, **arguments)
    random, loaders = torch.get_rng_state(), len(trainer.accelerator._dataloaders)
    current = trainer.accelerator.gradient_state.dataloader_references
    score_trainer(trainer, max_samples=8, progress=False)  # leaves the dataloader before its end
    assert torch.equal(torch.get_rng_state(), random)
    assert len(trainer.accelerator._dataloaders) == loaders
    assert trainer.accelerator.gradient_state.dataloader_references == current
    assert model.training
    assert losses_of(trainer) == expected


def test_scores_are_those_of_the_trainers_batches_and_loss(tmp_path: Path) -> None:
    scores = scored(trainer_of(adapted(), tmp_path))
    batches = [collate(ROWS[start : start + 4]) for start in range(0, 24, 4)]
    wanted = plop_ext.score(adapted(), batches, mask="completion", max_samples=None, stop=None, progress=False)
    np.testing.assert_allclose(scores.nfn, wanted.nfn, rtol=1e-6)
    assert scores.provenance["settings"]["mask"] == "completion"
    everything = scored(trainer_of(adapted(), tmp_path), mask="attention")
    assert everything.tokens == sum(len(row["input_ids"]) for row in ROWS) > scores.tokens


@pytest.mark.slow
def test_a_training_that_has_begun_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(adapted(), tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(InputError, match="has trained already"):
        scored(trainer)


def test_other_trainers_and_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a Trainer of transformers, TRL or Lightning"):
        scored(tiny_llama())
    trainer = trainer_of(adapted(), tmp_path)
    with pytest.raises(InputError, match="`sample` is no argument"):
        scored(trainer, sample=3)
    with pytest.raises(InputError, match="`rows` must be one of chosen, rejected, both"):
        scored(trainer, rows="best")
    with pytest.raises(InputError, match="leave them out"):
        score_trainer(trainer, data=[])


def test_every_batch_is_made_in_evaluation_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A trainer of RL writes completions when its batches are asked for: dropout would change the first ones.
    trainer = trainer_of(tiny_llama().train(), tmp_path)
    loader, modes = trainer.get_train_dataloader(), []

    class Watched:
        def __iter__(self) -> Iterator[Any]:
            for batch in loader:
                modes.append(trainer.model.training)
                yield batch

    monkeypatch.setattr(trainer, "get_train_dataloader", Watched)
    score_trainer(trainer, max_samples=12)
    assert len(modes) > 1 and not any(modes) and trainer.model.training
