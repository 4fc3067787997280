"""Short trainings of a tiny Llama by transformers' `Trainer`, and what they leave."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import nn

from tests.support.tiny_lm import tiny_llama

# Two lengths, so that batches are padded.
ROWS = [
    {
        "input_ids": [1, *range(5 + number, 15 + number + 5 * (number % 2))],
        "labels": [-100] * 4 + [7] * (7 + 5 * (number % 2)),
    }
    for number in range(24)
]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    ids = padded("input_ids", 0)
    mask = torch.tensor([[position < len(row["input_ids"]) for position in range(length)] for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100)}


def adapted(dropout: float = 0.1, **config: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(tiny_llama(**config), lora)


def trainer_of(model: nn.Module, folder: Any, **arguments: Any) -> Any:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 2} | arguments
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=settings.pop("report_to", []),
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=1e-2,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = Trainer(model=model, args=args, train_dataset=ROWS, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses_of(trainer: Any) -> list[float]:
    """Train, and return the losses that the trainer computed, one for each micro-batch."""
    losses: list[float] = []
    compute = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        found = compute(*args, **kwargs)
        losses.append(float(found[0] if isinstance(found, tuple) else found))
        return found

    trainer.compute_loss = compute_loss
    trainer.train()
    return losses


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


Watched = Callable[[Any], AbstractContextManager[Any]]
UNWATCHED: Watched = lambda trainer: nullcontext()  # noqa: E731
