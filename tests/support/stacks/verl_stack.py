"""verl with FSDP: Hydra over its configuration, its dataclass of models, and the function that wraps one."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from omegaconf import OmegaConf

from tests.support.stacks import Adapted
from tests.support.stacks.by_peft import model_for, of_trained
from tests.support.stacks.stand_ins import stand_in
from tests.support.stacks.verl_config import composed

stand_in("tensordict", "ray", "codetiming", "torchdata", "torchao", "vllm", "flash_attn", "transfer_queue")

from verl.workers.config.model import HFModelConfig  # noqa: E402
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine  # noqa: E402


def adapted(path: str) -> Adapted:
    keys: dict[str, Any] = OmegaConf.to_container(composed(path).actor_rollout_ref.model, resolve=True)
    known = {field.name: field for field in fields(HFModelConfig)}
    assert {"lora_rank", "lora_alpha", "target_modules"} <= set(keys)
    made = {name: keys.get(name, field.default) for name, field in known.items()}
    return of_trained(
        FSDPEngine._build_lora_module(SimpleNamespace(model_config=SimpleNamespace(**made)), model_for(path))
    )
