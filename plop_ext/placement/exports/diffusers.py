"""The training scripts of diffusers: options, as an array of Bash."""

from __future__ import annotations

from plop_ext.lora_target import LoraTarget
from plop_ext.placement.exports._stack import Plan, Stack
from plop_ext.placement.exports._text import as_array


def _entry(target: LoraTarget) -> str | None:
    return None if target.parameter or "," in target.name else target.name


def _write(plan: Plan) -> str:
    options = {
        "--rank": plan.r,
        "--lora_alpha": plan.alpha,
        "--lora_dropout": 0,
        "--lora_layers": ",".join(plan.modules),
    }
    return as_array("PLOP", options)


STACK = Stack(
    title="diffusers",
    release="0.42.1",
    form="options, as an array of Bash",
    write=_write,
    entry=_entry,
    use='source FILE; accelerate launch train_dreambooth_lora_flux.py "${PLOP[@]}" ...',
    caution="The names are those of the transformer alone: score the transformer, not the pipeline.",
)
