"""Placements of LoRA: chosen from scores, and exported to PEFT."""

from plop_ext.placement.placement import Placement
from plop_ext.placement.selection import STRATEGIES, select

__all__ = ["STRATEGIES", "Placement", "select"]
