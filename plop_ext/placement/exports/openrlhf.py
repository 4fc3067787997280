"""OpenRLHF: options of its commands, as an array of Bash."""

from __future__ import annotations

from plop_ext.placement.exports._stack import Plan, Stack
from plop_ext.placement.exports._text import as_array


def _write(plan: Plan) -> str:
    return as_array(
        "PLOP",
        {
            "--ds.lora.rank": plan.r,
            "--ds.lora.alpha": plan.alpha,
            "--ds.lora.dropout": 0,
            "--ds.lora.target_modules": plan.modules,
        },
    )


STACK = Stack(
    title="OpenRLHF",
    release="0.11.2",
    form="options, as an array of Bash",
    write=_write,
    use='source FILE; deepspeed --module openrlhf.cli.train_sft "${PLOP[@]}" ...',
)
