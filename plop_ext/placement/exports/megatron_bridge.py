"""Megatron-Bridge: a `CanonicalLoRA` in Python."""

from __future__ import annotations

from plop_ext.placement.exports import _megatron
from plop_ext.placement.exports._stack import Plan, Stack
from plop_ext.placement.exports._text import as_call


def _write(plan: Plan) -> str:
    keywords = {"target_modules": _megatron.patterns(plan), "dim": plan.r, "alpha": plan.alpha, "dropout": 0.0}
    call = as_call("CanonicalLoRA", [], keywords)
    return f"from megatron.bridge.peft.canonical_lora import CanonicalLoRA\n\npeft = {call}"


STACK = Stack(
    title="Megatron-Bridge",
    release="0.6.2",
    form="Python: a `CanonicalLoRA`",
    write=_write,
    peft=False,
    names="Megatron's names",
    entry=_megatron.entry,
    catches=_megatron.catches,
    use="Set it as the field peft of the recipe's configuration.",
    caution=_megatron.CAUTION,
)
