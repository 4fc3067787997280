"""torchtune: arguments of its model builders, which know kinds of modules and no single layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set

from plop_ext.lora_target import LoraTarget
from plop_ext.placement.exports._rules import module_name
from plop_ext.placement.exports._stack import Alphas, Plan, Stack
from plop_ext.placement.exports._text import as_yaml

_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
_MLP, _OUTPUT = "mlp", "output"
_NAME = re.compile(r"(?:model\.)?layers\.\d+\.(?:self_attn\.(?P<attention>\w+)|mlp\.(?:gate|up|down)_proj)")


def _entry(target: LoraTarget) -> str | None:
    return _kind(module_name(target) or "")


def _kind(name: str) -> str | None:
    """Return the kind of module that torchtune adapts everywhere for a name in the model of transformers."""
    if name == "lm_head":
        return _OUTPUT
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return _MLP if found["attention"] is None else _ATTENTION.get(found["attention"])


def _catches(entries: Set[str], names: Iterable[str]) -> list[str]:
    return [name for name in names if _kind(name) in entries]


def _write(plan: Plan) -> str:
    return as_yaml(
        {
            "model": {
                "lora_attn_modules": [name for name in _ATTENTION.values() if name in plan.modules],
                "apply_lora_to_mlp": _MLP in plan.modules,
                "apply_lora_to_output": _OUTPUT in plan.modules,
                "lora_rank": plan.r,
                "lora_alpha": plan.alpha,
                "lora_dropout": 0.0,
            }
        }
    )


STACK = Stack(
    title="torchtune",
    release="0.6.1",
    form="YAML, section `model`",
    write=_write,
    peft=False,
    alphas=Alphas.ONE,
    names="kinds of modules, in all layers",
    entry=_entry,
    catches=_catches,
    use="Add these keys to the section model of the recipe, beside its _component_.",
)
