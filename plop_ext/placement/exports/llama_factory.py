"""LLaMA-Factory: keys of its YAML."""

from __future__ import annotations

from plop_ext.lora_target import LoraTarget
from plop_ext.placement.exports._rules import by_substring
from plop_ext.placement.exports._stack import Plan, Stack
from plop_ext.placement.exports._text import as_yaml

# Parts of names of vision and audio towers, whose modules it passes over in a multimodal model.
_TOWERS = ("visual", "vision", "audio", "projector", "merger", "resampler", "vpm", "apm")


def _entry(target: LoraTarget) -> str | None:
    if target.parameter or "," in target.name:
        return None
    return None if any(word in target.name for word in _TOWERS) else target.name


def _write(plan: Plan) -> str:
    return as_yaml(
        {
            "finetuning_type": "lora",
            "lora_rank": plan.r,
            "lora_alpha": plan.alpha,
            "lora_dropout": 0.0,
            "lora_target": ",".join(plan.modules),
        }
    )


STACK = Stack(
    title="LLaMA-Factory",
    release="0.9.5",
    form="YAML for `llamafactory-cli train`",
    write=_write,
    names="full names; in multimodal models any part of a name",
    entry=_entry,
    catches=by_substring,
    use="Add these keys to the configuration of llamafactory-cli train.",
)
