"""GRPO on worked arithmetic: LoRA goes where the model's own completions say, and the reward rises.

python examples/grpo.py

`plop-tiny` first sees a few worked sums, so that it writes their form. `score_trainer` then lets the trainer generate
completions, as in training, and scores those. The reward is verified without a reference: each step has to add the
right numbers, and to add them right.
"""

from __future__ import annotations

import random
import re
import tempfile
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from trl import GRPOConfig, GRPOTrainer
from worked_sums import model_and_tokenizer

from plop_ext.data import encode
from plop_ext.data.batching import pad
from plop_ext.integrations import score_trainer

STEP = re.compile(r"(\d+) \+ (\d+) = (\d+)")


def worked(a: int, b: int, c: int) -> dict[str, str]:
    """Return a sum of three digits, worked in two steps."""
    return {
        "prompt": f"Q: {a} + {b} + {c} = ?\n",
        "completion": f"{a} + {b} = {a + b}; {a + b} + {c} = {a + b + c}; answer {a + b + c}\n",
    }


def reward(prompts: list[str], completions: list[str], **others: Any) -> list[float]:
    """Return the mean grade of two steps and the answer: half for the right numbers, half for the right sum."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        a, b, c = map(int, re.findall(r"\d+", prompt))
        steps = [tuple(map(int, step)) for step in STEP.findall(completion)]
        grades = [0.0, 0.0, 0.0]
        for place, (first, second) in enumerate([(a, b), (a + b, c)]):
            if len(steps) > place:
                right_numbers = steps[place][:2] == (first, second)
                grades[place] = 0.5 * right_numbers + 0.5 * (right_numbers and steps[place][2] == first + second)
        answer = re.search(r"answer (\d+)\n", completion)
        grades[2] = float(answer is not None and int(answer.group(1)) == a + b + c)
        found.append(sum(grades) / 3)
    return found


def main(warm_up: int = 50, steps: int = 20) -> list[float]:
    """Train, and return the mean reward of each step."""
    set_seed(0)
    model, tokenizer = model_and_tokenizer()
    draw = random.Random(0)
    rows = [worked(*(draw.randrange(1, 10) for _ in range(3))) for _ in range(512)]
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(
        **common, max_steps=warm_up, per_device_train_batch_size=32, learning_rate=2e-3, logging_steps=10,
        lr_scheduler_type="cosine", remove_unused_columns=False,
    )  # fmt: skip
    Trainer(
        model=model,
        args=arguments,
        train_dataset=encode(rows, tokenizer),
        data_collator=lambda samples: pad(samples, tokenizer.pad_token_id),
    ).train()

    arguments = GRPOConfig(
        **common, max_steps=steps, per_device_train_batch_size=64, num_generations=8, max_completion_length=40,
        learning_rate=1e-2, logging_steps=1, lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])

    def trainer(**more: Any) -> GRPOTrainer:
        return GRPOTrainer(
            model=model, args=arguments, train_dataset=prompts, processing_class=tokenizer, reward_funcs=reward, **more
        )

    placement = score_trainer(trainer()).place(types=3)
    print(placement)
    learner = trainer(peft_config=placement.lora_config(r=16, task_type="CAUSAL_LM"))
    placement.verify(learner.model)
    learner.remove_callback(PrinterCallback)
    learner.train()
    return [entry["reward"] for entry in learner.state.log_history if "reward" in entry]


if __name__ == "__main__":
    rewards = main()
    print("mean reward of each step:", *(f"{value:.2f}" for value in rewards))
