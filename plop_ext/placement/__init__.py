"""Where LoRA goes: chosen from scores, and handed to PEFT."""

from plop_ext.placement.placement import Placement
from plop_ext.placement.selection import STRATEGIES, select

__all__ = ["STRATEGIES", "Placement", "select"]
