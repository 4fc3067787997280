"""Lightning: LoRA is placed in `setup`, on the batches of the datamodule, before the optimizer is made.

python examples/lightning_module.py
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import lightning
import peft
import torch
from worked_sums import model_and_tokenizer, rows

from plop_ext.data import encode
from plop_ext.data.batching import pad
from plop_ext.integrations import score_trainer


class Sums(lightning.LightningDataModule):
    """Worked sums."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def train_dataloader(self) -> Any:
        encoded = encode(rows(), self.tokenizer)
        collate = partial(pad, pad_token_id=self.tokenizer.pad_token_id)
        return torch.utils.data.DataLoader(encoded, batch_size=16, shuffle=True, collate_fn=collate)


class Adapted(lightning.LightningModule):
    """A causal language model with LoRA where its own data says."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def setup(self, stage: str) -> None:
        placement = score_trainer(self.trainer).place(types=3)
        self.print(placement)
        self.model = peft.get_peft_model(self.model, placement.lora_config(r=8, task_type="CAUSAL_LM"))
        placement.verify(self.model.train())

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], lr=3e-3)


def main(steps: int = 20) -> list[float]:
    """Train, and return the loss of each step."""
    model, tokenizer = model_and_tokenizer()
    module = Adapted(model)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer.fit(module, datamodule=Sums(tokenizer))
    return module.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")
