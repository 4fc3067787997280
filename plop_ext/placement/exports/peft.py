"""PEFT: a `LoraConfig` in Python. `Placement.lora_config` makes the same object."""

from __future__ import annotations

from plop_ext.placement.exports._stack import Alphas, Plan, Stack
from plop_ext.placement.exports._text import as_call


def _write(plan: Plan) -> str:
    keywords = {"r": plan.r, "lora_alpha": plan.alpha, "target_modules": list(plan.modules)}
    if plan.parameters:
        keywords["target_parameters"] = list(plan.parameters)
    return "from peft import LoraConfig\n\nconfig = " + as_call("LoraConfig", [], keywords | plan.patterns())


STACK = Stack(
    title="PEFT",
    release="0.21",
    form="Python: a `LoraConfig`",
    write=_write,
    parameters=True,
    ranks=True,
    alphas=Alphas.ANY,
    use="model = peft.get_peft_model(model, config)",
)
