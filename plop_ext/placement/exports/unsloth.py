"""Unsloth: a call of `FastLanguageModel.get_peft_model`."""

from __future__ import annotations

from typing import Any

from plop_ext.placement.exports._stack import Alphas, Plan, Stack
from plop_ext.placement.exports._text import as_call


def _write(plan: Plan) -> str:
    keywords: dict[str, Any] = {
        "r": plan.r,
        "lora_alpha": plan.alpha,
        "lora_dropout": 0,
        "target_modules": list(plan.modules),
        # An empty list too: without it Unsloth adds the experts of a mixture of its own accord.
        "target_parameters": list(plan.parameters),
    }
    call = as_call("FastLanguageModel.get_peft_model", ["model"], keywords | plan.patterns())
    return f"from unsloth import FastLanguageModel\n\nmodel = {call}"


STACK = Stack(
    title="Unsloth",
    release="2026.10.9",
    form="Python: a call of `FastLanguageModel.get_peft_model`",
    write=_write,
    parameters=True,
    ranks=True,
    alphas=Alphas.ANY,
    heads=False,
    caution="Unsloth prints for full names that training may be slower: its fused kernels know eight short names.",
)
