"""LyCORIS: a preset in TOML."""

from __future__ import annotations

from plop_ext.placement.exports._rules import by_name, module_name
from plop_ext.placement.exports._stack import Alphas, Plan, Stack
from plop_ext.placement.exports._text import as_toml, one_regex


def _write(plan: Plan) -> str:
    # Its expressions match from the start of a name, and would go on after their end.
    ranks = {f"{one_regex(names)}$": rank for rank, names in sorted(plan.by_rank().items())}
    algorithms = {
        pattern: {"algo": "lora", "dim": rank, "alpha": rank * plan.scale} for pattern, rank in ranks.items()
    }
    # Without these empty lists the classes of its full preset come along.
    return as_toml(
        {
            "enable_conv": False,
            "target_module": [],
            "target_name": list(ranks),
            "unet_target_module": [],
            "unet_target_name": list(ranks),
            "text_encoder_target_module": [],
            "text_encoder_target_name": [],
            "name_algo_map": algorithms,
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
    names="regular expression",
    entry=module_name,
    catches=by_name,
    use='create_lycoris(model, preset="FILE"); in sd-scripts: network_module lycoris.kohya, network_args preset=FILE',
)
