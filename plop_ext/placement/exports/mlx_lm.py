"""MLX LM: the keys of its YAML that place LoRA."""

from __future__ import annotations

from plop_ext.placement.exports._rules import by_name, module_name
from plop_ext.placement.exports._stack import Alphas, Plan, Stack
from plop_ext.placement.exports._text import as_yaml


def _write(plan: Plan) -> str:
    return as_yaml(
        {
            "fine_tune_type": "lora",
            "num_layers": -1,  # all: its default, 16, is refused by a model with fewer
            "lora_parameters": {
                "keys": list(plan.modules),
                "rank": plan.r,
                "scale": plan.scale,  # alpha / r; a key alpha is refused
                "dropout": 0.0,
            },
        }
    )


STACK = Stack(
    title="MLX LM",
    release="0.32.2",
    form="YAML for `mlx_lm.lora --config`",
    write=_write,
    peft=False,
    alphas=Alphas.ONE,
    entry=module_name,
    catches=by_name,
    use="mlx_lm.lora --config FILE --train --model MODEL --data DATA",
)
