"""The choice of the way to run the forwards of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from plop_ext.collecting.collector import Collector
from plop_ext.forwards.batch import default_forward
from plop_ext.forwards.eager import EagerForwards
from plop_ext.forwards.fast.forwards import FastForwards
from plop_ext.forwards.graph.forwards import GraphedForwards, check_graph
from plop_ext.forwards.masks.known_models import may_omit_masks
from plop_ext.forwards.protocol import Forwards
from plop_ext.forwards.rule import GraphRule


def choose_forwards(
    model: nn.Module,
    forward: Callable[[nn.Module, Any], Any] | None,
    collector: Collector,
    *,
    fast: bool = False,
    graph: bool | GraphRule = False,
) -> Forwards:
    """Return the way to run the forwards of a run, to be entered within `collector`.

    Args:
        model: Prepared for scoring.
        forward: Function that runs a batch; None uses `default_forward`.
        collector: The collector that hooks the model.
        fast: Run the blocks of supported families on fused kernels.
        graph: Replay forwards as CUDA graphs: every kind of batch that can be, or those that a rule admits.

    Raises:
        InputError: If `graph` is true and the model is not on a CUDA device.
    """
    if graph is True:
        check_graph(model)
    plain = forward is None
    run = forward or default_forward(model, [layer.module for layer in collector.layers])
    decides_masks = plain and may_omit_masks(model)
    inner: Forwards
    if graph:
        rule = graph if isinstance(graph, GraphRule) else None
        inner = GraphedForwards(model, run, collector, plain=plain, decides_masks=decides_masks, rule=rule)
    else:
        inner = EagerForwards(model, run, collector, decides_masks=decides_masks)
    return FastForwards(model, collector, inner) if fast else inner
