"""Scores in the `setup` of a Lightning module, before its optimizer is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plop_ext
from plop_ext.errors import InputError
from plop_ext.integrations import score_trainer
from tests.support.tiny_lm import tiny_llama
from tests.support.trainings import ROWS, collate

lightning = pytest.importorskip("lightning")


def loader() -> Any:
    return torch.utils.data.DataLoader(ROWS, batch_size=4, collate_fn=collate)


class Module(lightning.LightningModule):  # type: ignore[misc]
    """A module that places LoRA where its own batches say, if it is asked to."""

    def __init__(self, types: int | None = None) -> None:
        super().__init__()
        self.model = tiny_llama()
        self.metric = torch.nn.Linear(2, 2)  # another child with weights
        self.types = types
        self.losses: list[float] = []
        self.scores: plop_ext.Scores | None = None

    def setup(self, stage: str) -> None:
        if self.types is None:
            return
        import peft

        self.scores = score_trainer(self.trainer, max_samples=None, stop=None, progress=False)
        placement = self.scores.place(types=self.types)
        self.model = peft.get_peft_model(self.model, placement.lora_config(r=2))
        placement.verify(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([weight for weight in self.model.parameters() if weight.requires_grad], lr=0.1)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.losses.append(float(loss))
        return loss


class Data(lightning.LightningDataModule):  # type: ignore[misc]
    def train_dataloader(self) -> Any:
        return loader()


def trainer(folder: Path) -> Any:
    return lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


@pytest.mark.parametrize("data", [{"datamodule": Data()}, {"train_dataloaders": loader()}], ids=["module", "loader"])
def test_scores_in_setup_are_those_of_the_training_data(data: dict[str, Any], tmp_path: Path) -> None:
    module = Module(types=2)
    trainer(tmp_path).fit(module, **data)
    wanted = plop_ext.score(tiny_llama(), loader(), mask="completion", max_samples=None, stop=None, progress=False)
    assert module.scores is not None and module.scores.module_names == wanted.module_names
    np.testing.assert_array_equal(module.scores.nfn, wanted.nfn)
    assert len(module.losses) == 3


def test_losses_are_bitwise_those_without(tmp_path: Path) -> None:
    plain, scored = Module(), Module()
    trainer(tmp_path).fit(plain, loader())
    fit = trainer(tmp_path)
    score_trainer(fit, scored, loader(), progress=False)
    fit.fit(scored, loader())
    assert scored.losses == plain.losses


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pass the Lightning module"):
        score_trainer(trainer(tmp_path))
    with pytest.raises(InputError, match="pass a datamodule or a dataloader"):
        score_trainer(trainer(tmp_path), Module())
    with pytest.raises(InputError, match="the training has 2 dataloaders; pass the one to score"):
        score_trainer(trainer(tmp_path), Module(), [loader(), loader()])
