"""Scored modules that PEFT adapts as they are."""

from __future__ import annotations

from plop_ext.lora_target import LoraTarget
from plop_ext.score_data import ScoredModule


def scored_module(
    name: str,
    module_type: str,
    layer: int | None,
    in_features: int,
    out_features: int,
    baseline: float = 1.0,
    weight_norm: float | None = None,
) -> ScoredModule:
    """An ordinary linear layer: its target is the module itself."""
    target = LoraTarget.of_module(name, in_features, out_features)
    return ScoredModule(name, module_type, layer, in_features, out_features, baseline, weight_norm, target)
