"""Preference training with TRL: the chosen completions decide where LoRA goes.

python examples/dpo.py

Without adapters, `DPOTrainer` would load a second copy of the model as its reference. The trainer that is scored has
a placeholder of rank 1, which `unload` takes out again.
"""

from __future__ import annotations

import random
import re
import tempfile
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer
from worked_sums import model_and_tokenizer, rows

from plop_ext.integrations import score_trainer


def pairs() -> list[dict[str, str]]:
    """Return worked sums as chosen completions, and the same with another answer as rejected ones."""
    draw = random.Random(0)
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": re.sub(r"answer \d+", f"answer {draw.randrange(10, 100)}", row["completion"]),
        }
        for row in rows(128)
    ]


def main(steps: int = 12) -> list[float]:
    """Train, and return the margin between chosen and rejected rewards of each step."""
    model, tokenizer = model_and_tokenizer()
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    common: dict[str, Any] = {"args": arguments, "processing_class": tokenizer}

    placeholder = LoraConfig(r=1, target_modules=["model.layers.0.self_attn.q_proj"])
    probe = DPOTrainer(model=model, train_dataset=Dataset.from_list(pairs()), peft_config=placeholder, **common)
    placement = score_trainer(probe).place(types=3)
    print(placement)

    model = probe.model.unload()
    config = placement.lora_config(r=8, task_type="CAUSAL_LM")
    trainer = DPOTrainer(model=model, train_dataset=probe.train_dataset, peft_config=config, **common)
    placement.verify(trainer.model)
    trainer.train()
    return [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]


if __name__ == "__main__":
    margins = main()
    print(f"margin: {margins[0]:.3f} in the first step, {margins[-1]:.3f} in the last")
