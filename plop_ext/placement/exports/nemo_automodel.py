"""NeMo Automodel: the `peft` section of its YAML."""

from __future__ import annotations

from plop_ext.placement.exports._rules import by_name, module_name
from plop_ext.placement.exports._stack import Plan, Stack
from plop_ext.placement.exports._text import as_yaml


def _write(plan: Plan) -> str:
    return as_yaml(
        {
            "peft": {
                "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
                "target_modules": list(plan.modules),
                "dim": plan.r,
                "alpha": plan.alpha,
                "dropout": 0.0,
            }
        }
    )


STACK = Stack(
    title="NeMo Automodel",
    release="0.7.0",
    form="YAML, section `peft`",
    write=_write,
    peft=False,
    entry=module_name,
    catches=by_name,
    use="Replace the section peft of the recipe by this one.",
)
