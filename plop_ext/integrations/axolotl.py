"""A plugin of Axolotl that puts LoRA where a placement says, once the model is loaded.

In the configuration of `axolotl train`:

    plugins: [plop_ext.integrations.axolotl.PlopPlugin]
    plop_placement: placement.json
    adapter: lora
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from plop_ext.placement import Placement, exports
from plop_ext.placement.exports.axolotl import keys


class PlopArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's configuration.

    Attributes:
        plop_placement: File that `plop place` wrote.
    """

    plop_placement: str


class PlopPlugin(BasePlugin):
    """Sets Axolotl's keys for LoRA from a placement, and checks that the loaded model is the one that was scored."""

    def get_input_args(self) -> str:
        """Return the path of the model of the plugin's keys."""
        return f"{__name__}.PlopArgs"

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        """Replace the targets and ranks in `cfg`; the configuration's own `lora_r` and `lora_alpha` hold if set.

        Args:
            cfg: Axolotl's configuration.
            model: The loaded model, without adapters.

        Raises:
            InputError: If the file is no placement, another model was scored, or Axolotl cannot say the placement.
        """
        placement = Placement.load(cfg.plop_placement)
        placement.check_model(model)
        plan = exports.plan(placement, "axolotl", r=cfg.lora_r, lora_alpha=cfg.lora_alpha)
        placed = keys(plan)
        if cfg.lora_dropout and not plan.parameters:
            del placed["lora_dropout"]
        cfg.update(placed)
