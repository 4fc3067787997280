"""Layers as `discover` finds them, made by hand, and the numbers of a run over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from plop_ext.layers import LayerAdapter, LinearLayer
from plop_ext.layers.experts import ExpertsAdapter
from plop_ext.lora_target import LoraTarget
from plop_ext.scoring.baseline import WeightNorms
from plop_ext.scoring.outcome import Outcome
from plop_ext.totals import Totals


class Dequantized(LayerAdapter):
    """Of a quantized weight."""

    kind = "4-bit"
    weights = "dequantized"


def found_layer(name: str, adapter: LayerAdapter | None = None, layer: int | None = 0) -> LinearLayer:
    """A layer of 3 in-features and 2 out-features, whose type is the last part of its name."""
    target = LoraTarget.of_module(name, 3, 2)
    kind = name.rpartition(".")[2]
    return LinearLayer(name, kind, layer, 3, 2, nn.Linear(3, 2), adapter or LayerAdapter(), target)


def expert(name: str) -> LinearLayer:
    """A projection that sees the tokens routed to it."""
    return found_layer(name, ExpertsAdapter())


def run_outcome(
    totals: Totals,
    *,
    baselines: Sequence[float] | None = None,
    norms: Sequence[float] | None = None,
    failures: Mapping[str, str] | None = None,
    **changes: Any,
) -> Outcome:
    """The numbers of a run with these totals; baselines and weight norms are 1."""
    modules, samples = totals.tokens.shape
    ones = [1.0] * modules
    fields = {
        "ids": range(samples),
        "batches": [0] * samples,
        "unassigned": {},
        "experts_implementation": None,
    }
    weight_norms = WeightNorms(list(norms or ones), dict(failures or {}))
    return Outcome(totals, weight_norms, list(baselines or ones), **{**fields, **changes})
