"""musubi-tuner: keys of its TOML."""

from __future__ import annotations

from plop_ext.placement.exports._rules import by_name, module_name
from plop_ext.placement.exports._stack import Alphas, Plan, Stack
from plop_ext.placement.exports._text import as_toml, one_regex


def _write(plan: Plan) -> str:
    # What is included is only spared from exclusion, so that everything has to be excluded first.
    patterns = [f"exclude_patterns={['.*']!r}", f"include_patterns={[one_regex(plan.modules)]!r}"]
    return as_toml({"network_dim": plan.r, "network_alpha": plan.alpha, "network_args": patterns})


STACK = Stack(
    title="musubi-tuner",
    release="of 2026-06-24",
    form="TOML for `--config_file`",
    write=_write,
    peft=False,
    alphas=Alphas.ONE,
    names="regular expression",
    entry=module_name,
    catches=by_name,
    use="accelerate launch MODEL_train_network.py --config_file FILE ...",
    caution="The names are those of the model as musubi-tuner builds it; modules outside its blocks get no LoRA.",
)
