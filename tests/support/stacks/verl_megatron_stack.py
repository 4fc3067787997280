"""verl with Megatron: Hydra over its configuration, and the object of Megatron-Bridge that it makes of it."""

from __future__ import annotations

from omegaconf import OmegaConf

from tests.support.stacks import Adapted
from tests.support.stacks.megatron_bridge_stack import of_object
from tests.support.stacks.verl_config import composed


def adapted(path: str) -> Adapted:
    from megatron.bridge.peft.utils import create_peft

    keys = OmegaConf.to_container(composed(path).actor_rollout_ref.model.lora, resolve=True)
    return of_object(create_peft(keys))
