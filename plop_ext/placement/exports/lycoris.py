"""LyCORIS: a preset in TOML."""

from __future__ import annotations

import re

from plop_ext.lora_target import LoraTarget
from plop_ext.placement.exports._rules import by_name, module_name
from plop_ext.placement.exports._stack import Alphas, Plan, Stack
from plop_ext.placement.exports._text import as_toml


def _entry(target: LoraTarget) -> str | None:
    name = module_name(target)
    return name if name is not None and re.fullmatch(r"[\w.\-]+", name) else None


def _write(plan: Plan) -> str:
    # Whole names, compared by fnmatch: LyCORIS would match an expression from the start of a name only, and its reader
    # of TOML keeps the escapes of a key. Without the empty lists the classes of its full preset come along.
    ranks = {name: plan.ranks.get(name, plan.r) for name in plan.modules}
    return as_toml(
        {
            "enable_conv": False,
            "use_fnmatch": True,
            "target_module": [],
            "target_name": list(ranks),
            "unet_target_module": [],
            "unet_target_name": list(ranks),
            "text_encoder_target_module": [],
            "text_encoder_target_name": [],
            "name_algo_map": {
                name: {"algo": "lora", "dim": rank, "alpha": rank * plan.scale} for name, rank in ranks.items()
            },
        }
    )


STACK = Stack(
    title="LyCORIS",
    release="4.1.3",
    form="TOML: a preset",
    write=_write,
    peft=False,
    ranks=True,
    alphas=Alphas.ANY,
    entry=_entry,
    catches=by_name,
    use='create_lycoris(model, preset="FILE"); in sd-scripts: network_module lycoris.kohya, network_args preset=FILE',
)
