"""Axolotl: keys of its YAML. `plop_ext.integrations.axolotl` is a plugin that sets the same keys."""

from __future__ import annotations

from typing import Any

from plop_ext.placement.exports._stack import Alphas, Plan, Stack
from plop_ext.placement.exports._text import as_yaml


def keys(plan: Plan) -> dict[str, Any]:
    """Return the keys of Axolotl's configuration that place LoRA."""
    # Entries of its lists are names: a regular expression among them passes its checks and matches nothing.
    content: dict[str, Any] = {
        "lora_r": plan.r,
        "lora_alpha": plan.alpha,
        "lora_dropout": 0.0,
        "lora_target_linear": False,  # true adds every linear layer
        "lora_target_modules": list(plan.modules),
    }
    if plan.parameters:
        content["lora_target_parameters"] = list(plan.parameters)
    return content | {f"lora_{name}": pattern for name, pattern in plan.patterns().items()}


def _write(plan: Plan) -> str:
    return as_yaml({"adapter": "lora", **keys(plan)})


STACK = Stack(
    title="Axolotl",
    release="0.21.0",
    form="YAML, or the plugin `plop_ext.integrations.axolotl.PlopPlugin`",
    write=_write,
    parameters=True,
    ranks=True,
    alphas=Alphas.WHOLE,
    use="Add these keys to the configuration of axolotl train.",
)
