"""Supervised finetuning with TRL: LoRA goes where the trainer's own batches say.

python examples/sft.py

A first trainer, without adapters, prepares the data and is scored; a second one trains. The adapter is then merged
into the weights, as a server without LoRA would load it, and vLLM gets it unmerged.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer
from worked_sums import model_and_tokenizer, rows

from plop_ext.integrations import score_trainer


def main(folder: Path, steps: int = 20) -> list[float]:
    """Train, save the adapter and the merged model to `folder`, and return the loss of each step."""
    model, tokenizer = model_and_tokenizer()
    arguments = SFTConfig(
        output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    common: dict[str, Any] = {"model": model, "args": arguments, "processing_class": tokenizer}

    probe = SFTTrainer(**common, train_dataset=Dataset.from_list(rows()))
    scores = score_trainer(probe)
    placement = scores.place(types=3)
    print(scores, placement, sep="\n")

    config = placement.lora_config(r=8, task_type="CAUSAL_LM")
    trainer = SFTTrainer(**common, train_dataset=probe.train_dataset, peft_config=config)
    placement.verify(trainer.model)
    trainer.train()

    adapted = trainer.model.eval()
    adapted.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    example = tokenizer("Q: 12 + 34 = ?\n", return_tensors="pt")
    with torch.no_grad():
        expected = adapted(**example).logits
        loaded = PeftModel.from_pretrained(model_and_tokenizer()[0], folder / "adapter")
        placement.verify(loaded)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**example).logits, expected, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
    print(f"loss: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")
