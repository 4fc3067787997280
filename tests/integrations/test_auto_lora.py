"""One call from a model and data to a model with adapters."""

from __future__ import annotations

import pytest
import torch

import plop_ext
from plop_ext.errors import InputError
from tests.support.tiny_lm import byte_tokenizer, tiny_llama

TEXTS = [f"{number} and {number} are {2 * number}, and a few words more" for number in range(12)]


def test_the_adapted_modules_are_those_of_the_placement() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    placement = plop_ext.score(model, TEXTS, tokenizer, progress=False).place(types=2)
    adapted = plop_ext.auto_lora(model, TEXTS, tokenizer, r=4, types=2, lora={"lora_dropout": 0.1}, progress=False)
    placement.verify(adapted)
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (4, 8, 0.1, "CAUSAL_LM")
    assert not adapted.training
    assert adapted(torch.tensor([[1, 5, 6]])).logits.shape == (1, 3, 259)


@pytest.mark.slow
def test_a_budget_decides_on_the_rank() -> None:
    adapted = plop_ext.auto_lora(tiny_llama(), TEXTS, byte_tokenizer(), types=2, max_params=2000, progress=False)
    trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert 1000 < trainable <= 2000


@pytest.mark.slow
def test_adapters_are_not_stacked() -> None:
    adapted = plop_ext.auto_lora(tiny_llama(), TEXTS, byte_tokenizer(), types=2, progress=False)
    with pytest.raises(InputError, match="has adapters already"):
        plop_ext.auto_lora(adapted, TEXTS, byte_tokenizer(), progress=False)


def test_each_module_keeps_its_training_mode() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    adapted = plop_ext.auto_lora(model, TEXTS, byte_tokenizer(), types=2, progress=False)
    assert {name: module.training for name, module in modules.items()} == modes
    for name, module in adapted.named_modules():
        if "lora_" in name:
            assert module.training == ("layers.0." not in name), name
