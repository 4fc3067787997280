"""ms-swift: its arguments in YAML."""

from __future__ import annotations

from typing import Any

from plop_ext.placement.exports._stack import Alphas, Plan, Stack
from plop_ext.placement.exports._text import as_yaml


def _write(plan: Plan) -> str:
    content: dict[str, Any] = {
        "tuner_type": "lora",
        "lora_rank": plan.r,
        "lora_alpha": plan.alpha,
        "lora_dropout": 0.0,  # its default, 0.05, is refused with parameters
    }
    if plan.modules:
        content["target_modules"] = list(plan.modules)
    else:
        content["target_regex"] = "(?!)"  # matches nothing; without it the target is all-linear
    if plan.parameters:
        content["target_parameters"] = list(plan.parameters)
    return as_yaml(content)


STACK = Stack(
    title="ms-swift",
    release="4.6.0",
    form="YAML for `swift sft`",
    write=_write,
    parameters=True,
    alphas=Alphas.ONE,
    use="swift sft FILE.yaml --model MODEL --dataset DATA",
)
