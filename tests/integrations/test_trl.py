"""Scores in TRL's trainers: the training is bitwise that without them, and they count what the loss counts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plop_ext
from plop_ext.errors import InputError
from plop_ext.integrations import PlopCallback, score_trainer
from plop_ext.integrations.trl_pairs import rows_of
from tests.support.tiny_lm import byte_tokenizer, tiny_llama
from tests.support.trainings import losses_of

trl = pytest.importorskip("trl")

PROMPTS = [f"{number}+{number + 1}=" for number in range(16)]
ANSWERS = [f"{2 * number + 1} and {'more ' * (number % 3)}" for number in range(16)]
PAIRS = [
    {"prompt": prompt, "chosen": answer, "rejected": "no"} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
]
COMPLETIONS = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
WHOLE = [{"chosen": f"{row['prompt']}{row['chosen']}", "rejected": f"{row['prompt']}no"} for row in PAIRS]
CASES: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft packing": {"packing": True, "max_length": 64},
    "sft padding-free": {"padding_free": True, "pad_to_multiple_of": 32, "max_length": None},
    "sft accumulation": {"bf16": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "dpo": {},
    "reward": {},
    "grpo": {"num_generations": 2, "max_completion_length": 6},
}


def reward(completions: list[str], **others: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def trainer_of(name: str, folder: Path, *, adapted: bool = True) -> Any:
    import datasets
    from peft import LoraConfig

    stack = name.split()[0]
    settings: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1} | CASES[name]
    common = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "dataloader_pin_memory": False,
    }
    rows = {"sft": COMPLETIONS, "dpo": PAIRS, "reward": WHOLE, "grpo": [{"prompt": prompt} for prompt in PROMPTS]}
    model: Any = tiny_llama()
    if stack == "reward":
        from transformers import LlamaForSequenceClassification

        torch.manual_seed(0)
        model.config.num_labels = 1
        model = LlamaForSequenceClassification(model.config)
    torch.manual_seed(0)
    names = {"sft": "SFT", "dpo": "DPO", "reward": "Reward", "grpo": "GRPO"}[stack]
    more: dict[str, Any] = {"reward_funcs": reward} if stack == "grpo" else {}
    if adapted:
        more["peft_config"] = LoraConfig(r=2, target_modules=["model.layers.0.self_attn.q_proj", "down_proj"])
    return getattr(trl, f"{names}Trainer")(
        model=model,
        args=getattr(trl, f"{names}Config")(**common | settings),
        train_dataset=datasets.Dataset.from_list(rows[stack]),
        processing_class=byte_tokenizer(),
        **more,
    )


def scored(trainer: Any, **options: Any) -> plop_ext.Scores:
    return score_trainer(trainer, **{"max_samples": None, "stop": None, "progress": False} | options)


@pytest.mark.parametrize("name", CASES)
def test_trainings_are_bitwise_those_without_scores(name: str, tmp_path: Path) -> None:
    plain = trainer_of(name, tmp_path)
    expected = losses_of(plain)
    before = trainer_of(name, tmp_path)
    metrics = copy.deepcopy(dict(before._metrics)) if hasattr(before, "_metrics") else None
    scores = scored(before, max_samples=4)
    assert (copy.deepcopy(dict(before._metrics)) if metrics is not None else None) == metrics
    assert losses_of(before) == expected
    during = trainer_of(name, tmp_path)
    with PlopCallback(during, token_step=1) as watch:
        assert losses_of(during) == expected
    assert watch.scores().module_names == scores.module_names
    logged = [{key: value for key, value in entry.items() if "plop" not in key} for entry in during.state.log_history]
    assert [sorted(entry) for entry in plain.state.log_history] == [
        sorted(entry) for entry in logged if set(entry) > {"epoch", "step"}
    ]


def test_chosen_completions_count_by_default(tmp_path: Path) -> None:
    trainer = trainer_of("dpo", tmp_path)
    chosen, both = scored(trainer), scored(trainer, rows="both")
    tokenizer = byte_tokenizer()
    length = {side: [len(tokenizer(row[side])["input_ids"]) for row in PAIRS] for side in ("chosen", "rejected")}
    # TRL adds an end to each completion, whose beginning the tokenizer does not mark.
    assert chosen.tokens == sum(length["chosen"])
    assert both.tokens == sum(length["chosen"]) + sum(length["rejected"])
    assert len(chosen.sample_ids) == 16 and len(both.sample_ids) == 32


def test_packed_and_padded_batches_have_the_scores_of_plain_ones(tmp_path: Path) -> None:
    plain = scored(trainer_of("sft", tmp_path))
    for name in ("sft packing", "sft padding-free"):
        found = scored(trainer_of(name, tmp_path))
        assert found.tokens == plain.tokens and len(found.sample_ids) == len(plain.sample_ids)
        np.testing.assert_allclose(found.nfn, plain.nfn, rtol=1e-4)  # attention adds up in another order
    everything = {name: scored(trainer_of(name, tmp_path), mask="attention") for name in ("sft", "sft padding-free")}
    assert everything["sft"].tokens == everything["sft padding-free"].tokens


def test_on_policy_completions_are_scored(tmp_path: Path) -> None:
    trainer = trainer_of("grpo", tmp_path)
    scores = scored(trainer, max_samples=8)
    assert len(scores.sample_ids) == 8 and 8 <= scores.tokens <= 8 * 6
    assert scores.provenance["settings"]["mask"] == "completion"


def test_a_placement_of_a_probe_trains_in_a_second_trainer(tmp_path: Path) -> None:
    probe = trainer_of("sft", tmp_path, adapted=False)
    placement = scored(probe).place(types=2)
    trainer = trl.SFTTrainer(
        model=probe.model,
        args=probe.args,
        train_dataset=probe.train_dataset,
        processing_class=byte_tokenizer(),
        peft_config=placement.lora_config(r=2, task_type="CAUSAL_LM"),
    )
    placement.verify(trainer.model)
    trainer.train()


def test_the_two_forms_of_pairs_agree() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
    now = {"input_ids": ids, "attention_mask": (ids > 0).long(), "completion_mask": (ids > 6).long()}
    before = {
        "prompt_input_ids": ids[:1, :2],
        "prompt_attention_mask": torch.ones(1, 2, dtype=torch.long),
        "chosen_input_ids": ids[:1, 2:],
        "chosen_attention_mask": torch.ones(1, 2, dtype=torch.long),
        "rejected_input_ids": ids[1:, 2:],
        "rejected_attention_mask": torch.tensor([[1, 0]]),
    }
    for rows in ("chosen", "rejected", "both"):
        first, second = rows_of(now, rows), rows_of(before, rows)
        assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_other_trainers_of_trl_are_named() -> None:
    class KTOTrainer:
        __module__ = "trl.trainer.kto_trainer"

    class Own(KTOTrainer):
        pass

    with pytest.raises(InputError, match="is a KTOTrainer, whose batches are not those of its model"):
        score_trainer(Own())


def test_a_prompt_alone_is_refused() -> None:
    with pytest.raises(InputError, match="`score_trainer`"):
        plop_ext.score(tiny_llama(), [[{"prompt": "1+1="}]] * 2, progress=False)
