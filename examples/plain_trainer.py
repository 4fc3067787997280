"""transformers' `Trainer`: LoRA in one call, and scores while it trains.

python examples/plain_trainer.py

`plop report training.json -o training.html` shows what this writes, with the drift of NFN over the steps. The drift is
logged too, as `plop/nfn/TYPE`, to whatever `report_to` names.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from worked_sums import model_and_tokenizer, rows

import plop_ext
from plop_ext.data import encode
from plop_ext.data.batching import pad
from plop_ext.integrations import PlopCallback


def main(folder: Path, steps: int = 20) -> list[dict[str, Any]]:
    """Train, write `training.json` to `folder`, and return the records of the drift."""
    model, tokenizer = model_and_tokenizer()
    encoded = encode(rows(), tokenizer)
    adapted = plop_ext.auto_lora(model, encoded, tokenizer, types=3, r=8, mask="completion")
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3,
        logging_steps=5, report_to=[], save_strategy="no", use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=encoded,
        data_collator=lambda samples: pad(samples, tokenizer.pad_token_id),
    )
    with PlopCallback(trainer, mask="completion") as watch:
        trainer.train()
    watch.scores().save(folder / "training.json")
    return watch.drift


if __name__ == "__main__":
    drift = main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
    for record in drift:
        print(record["step"], {label: round(value, 4) for label, value in record["nfn"].items()})
