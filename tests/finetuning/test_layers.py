"""A placement on experts, on dense weights of a mixture and on packed weights trains, reloads, and leaves no trace."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plop_ext import finetune, score
from plop_ext.data import Encoded
from plop_ext.finetuning.evaluation import held_out_losses
from tests.support.architecture_parts import text_batch
from tests.support.architectures import ARCHITECTURES

TOKENIZER: Any = SimpleNamespace(pad_token_id=0, eos_token_id=2)


def samples() -> list[Encoded]:
    return [Encoded(input_ids=row, labels=row) for row in text_batch()["input_ids"].tolist() * 4]


def held_out() -> list[Encoded]:
    """Beginnings of the rows that are trained on, whose loss falls too."""
    return [Encoded(input_ids=row[:-1], labels=row[:-1]) for row in text_batch()["input_ids"].tolist()]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "phi3", "gpt2"])
def test_trains_reloads_and_leaves_no_trace(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = ARCHITECTURES[name].build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = {key: type(module) for key, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        placement = score(model, [text_batch()], progress=False).place(strategy="all")
        result = finetune(
            model,
            TOKENIZER,
            samples(),
            held_out(),
            placement,
            r=2,
            learning_rate=1e-2,
            max_steps=6,
            batch_size=4,
            progress=False,
            output_dir=tmp_path / "adapter",
        )
    assert result.trainable_params == placement.num_parameters(2)
    assert result.loss_after < result.loss_before
    assert {key: type(module) for key, module in model.named_modules()} == classes
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    loaded = PeftModel.from_pretrained(ARCHITECTURES[name].build(), tmp_path / "adapter")
    placement.verify(loaded)
    assert held_out_losses(loaded, held_out(), pad_token_id=0).mean == pytest.approx(result.loss_after, abs=1e-5)
