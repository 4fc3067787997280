"""Configurations of stacks that read a file: Axolotl, LLaMA-Factory, and vLLM for serving.

python examples/configs.py FOLDER

Scores `plop-tiny` on worked sums, and writes the placement into a configuration of each stack, with the keys that
belong to the data and the run before it. The files beside this script are what it writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from worked_sums import model_and_tokenizer, rows

import plop_ext

AXOLOTL = """\
base_model: ./plop-tiny
datasets:
  - path: sums.jsonl
    ds_type: json
    type:
      field_instruction: prompt
      field_output: completion
      format: "{instruction}"
      no_input_format: "{instruction}"
sequence_len: 256
micro_batch_size: 16
num_epochs: 1
learning_rate: 0.003
output_dir: ./adapter
"""
LLAMA_FACTORY = """\
model_name_or_path: ./plop-tiny
stage: sft
do_train: true
dataset_dir: .
dataset: sums  # dataset_info.json: {"sums": {"file_name": "sums.jsonl", "columns": {"prompt": "prompt", ...}}}
template: empty
cutoff_len: 256
per_device_train_batch_size: 16
num_train_epochs: 1.0
learning_rate: 0.003
output_dir: ./adapter
"""
VLLM = """\
# vllm serve --config vllm.yaml
model: ./plop-tiny
enable-lora: true
max-lora-rank: {rank}
lora-modules: sums=./adapter
"""


def texts() -> dict[str, str]:
    """Return the text of each file by its name."""
    model, tokenizer = model_and_tokenizer()
    placement = plop_ext.score(model, rows(64), tokenizer, mask="completion", progress=False).place(types=3, r=16)
    return {
        "axolotl.yaml": AXOLOTL + placement.export("axolotl"),
        "llama_factory.yaml": LLAMA_FACTORY + placement.export("llama-factory"),
        "vllm.yaml": VLLM.format(rank=placement.r),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    for name, text in texts().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)
