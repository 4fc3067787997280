"""verl with FSDP: a configuration for Hydra on top of its PPO trainer's."""

from __future__ import annotations

from typing import Any

from plop_ext.placement.exports._stack import Plan, Stack
from plop_ext.placement.exports._text import as_yaml


def _write(plan: Plan) -> str:
    model: dict[str, Any] = {
        "lora_rank": plan.r,
        "lora_alpha": plan.alpha,
        "target_modules": list(plan.modules),
    }
    if plan.parameters:
        model["target_parameters"] = list(plan.parameters)  # its dataclass has it, its own YAML does not
    return as_yaml({"defaults": ["ppo_trainer", "_self_"], "actor_rollout_ref": {"model": model}})


STACK = Stack(
    title="verl (FSDP)",
    release="0.9.1",
    form="YAML for Hydra",
    write=_write,
    parameters=True,
    use="Save as plop.yaml; python -m verl.trainer.main_ppo --config-dir . --config-name plop ...",
)
