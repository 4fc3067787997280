"""prime-rl: the table `model.lora` of its TOML."""

from __future__ import annotations

from plop_ext.placement.exports._rules import by_name, module_name
from plop_ext.placement.exports._stack import Alphas, Plan, Stack
from plop_ext.placement.exports._text import as_toml, one_regex


def _write(plan: Plan) -> str:
    # A name with a dot is searched for as a regular expression, anywhere.
    lora = {"rank": plan.r, "alpha": plan.alpha, "dropout": 0.0, "target_modules": [f"^{one_regex(plan.modules)}$"]}
    return as_toml({"model": {"lora": lora}})


STACK = Stack(
    title="prime-rl",
    release="of 2026-08-21",
    form="TOML, table `model.lora`",
    write=_write,
    peft=False,
    alphas=Alphas.ONE,
    names="regular expression",
    entry=module_name,
    catches=by_name,
    use="uv run sft @ sft.toml @ FILE; for uv run rl, name the table trainer.model.lora.",
)
