"""LLaMA-Factory: its parser of arguments, and the function that wraps the model."""

from __future__ import annotations

import os
from types import SimpleNamespace

import yaml
from transformers import HfArgumentParser

from tests.support.placed_models import llama
from tests.support.stacks import Adapted
from tests.support.stacks.by_peft import of_model, of_trained
from tests.support.stacks.stand_ins import stand_in

os.environ["DISABLE_VERSION_CHECK"] = "1"
stand_in("trl", "torchao")

from llamafactory.hparams.finetuning_args import FinetuningArguments  # noqa: E402
from llamafactory.model.adapter import _setup_lora_tuning  # noqa: E402


def adapted(path: str) -> Adapted:
    with open(path, encoding="utf-8") as stream:
        (arguments,) = HfArgumentParser(FinetuningArguments).parse_dict(yaml.safe_load(stream))
    found = []
    for kind in ("llama", "gemma3"):  # a multimodal model, in whose names it looks for parts
        model = llama()
        model.config.model_type = kind
        loading = SimpleNamespace(adapter_name_or_path=None, resize_vocab=False, use_kt=False, use_unsloth=False)
        wrapped = _setup_lora_tuning(model.config, model, loading, arguments, True, False)
        found.append(of_trained(wrapped) if kind == "llama" else of_model(wrapped))
    assert found[0] == found[1]
    return found[0]
