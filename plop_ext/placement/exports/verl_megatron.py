"""verl with Megatron: a configuration for Hydra on top of its PPO trainer's."""

from __future__ import annotations

from plop_ext.placement.exports import _megatron
from plop_ext.placement.exports._stack import Plan, Stack
from plop_ext.placement.exports._text import as_yaml


def _write(plan: Plan) -> str:
    lora = {
        "type": "canonical_lora",
        "rank": plan.r,
        "alpha": plan.alpha,
        "dropout": 0.0,
        "target_modules": _megatron.patterns(plan),
        "exclude_modules": [],
    }
    content = {"defaults": ["ppo_megatron_trainer", "_self_"], "actor_rollout_ref": {"model": {"lora": lora}}}
    return as_yaml(content)


STACK = Stack(
    title="verl (Megatron)",
    release="0.9.1",
    form="YAML for Hydra",
    write=_write,
    peft=False,
    names="Megatron's names",
    entry=_megatron.entry,
    catches=_megatron.catches,
    use="Save as plop.yaml; python -m verl.trainer.main_ppo --config-dir . --config-name plop ...",
    caution=_megatron.CAUTION,
)
