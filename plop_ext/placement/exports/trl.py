"""TRL's command: the fields of its `ModelConfig` in YAML."""

from __future__ import annotations

from plop_ext.placement.exports._stack import Plan, Stack
from plop_ext.placement.exports._text import as_yaml


def _write(plan: Plan) -> str:
    # TRL makes a string of a list of one, and PEFT reads a string as a regular expression. An empty list keeps PEFT
    # from adding its defaults.
    modules = list(plan.modules) * (2 if len(plan.modules) == 1 else 1)
    content = {
        "use_peft": True,
        "lora_r": plan.r,
        "lora_alpha": plan.alpha,
        "lora_dropout": 0.0,  # its default, 0.05, is refused with parameters
        "lora_target_modules": modules,
    }
    if plan.parameters:
        content["lora_target_parameters"] = list(plan.parameters)
    return as_yaml(content)


STACK = Stack(
    title="TRL",
    release="1.16.0",
    form="YAML for `trl sft --config`",
    write=_write,
    parameters=True,
    use="trl sft --config FILE --model_name_or_path MODEL --dataset_name DATA",
)
