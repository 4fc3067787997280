"""sd-scripts of kohya-ss, without LyCORIS: keys of its TOML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set

from plop_ext.lora_target import LoraTarget
from plop_ext.placement.exports._rules import module_name
from plop_ext.placement.exports._stack import Alphas, Plan, Stack
from plop_ext.placement.exports._text import as_toml, one_regex

_PREFIX = "lora_unet_"


def _flat(name: str) -> str:
    """Return a name as the network of sd-scripts has it, with underscores for dots."""
    return name.replace(".", "_")


def _entry(target: LoraTarget) -> str | None:
    name = module_name(target)
    # Its list of pairs is cut at commas and at the first equals sign.
    return None if name is None or not re.fullmatch(r"[\w.\-]+", name) else _flat(name)


def _catches(entries: Set[str], names: Iterable[str]) -> list[str]:
    return [name for name in names if _flat(name) in entries]


def _write(plan: Plan) -> str:
    pairs = [f"^{_PREFIX}{one_regex(names)}$={rank}" for rank, names in sorted(plan.by_rank().items())]
    return as_toml(
        {
            "network_module": "networks.lora_flux",
            "network_dim": 0,  # of every other module: it gets none
            "network_alpha": plan.alpha,
            "network_args": [f"network_reg_dims={','.join(pairs)}"],
            "network_train_unet_only": True,
        }
    )


STACK = Stack(
    title="sd-scripts",
    release="of 2026-02-16",
    form="TOML for `--config_file`",
    write=_write,
    peft=False,
    ranks=True,
    alphas=Alphas.ONE,
    names="names with underscores for dots",
    entry=_entry,
    catches=_catches,
    use="accelerate launch flux_train_network.py --config_file FILE ...",
    caution="The names are those of the model as sd-scripts builds it; other models need their own network_module.",
)
