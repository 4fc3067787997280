"""Forwards in which processes exchange weights or activations, so that each forward waits for those of others."""

from __future__ import annotations

from torch import nn

from plop_ext.layers.sharded import division_of, is_sharded
from plop_ext.layers.stages import stages_group


def why_communicating(model: nn.Module) -> str:
    """Return what the processes that hold `model` exchange in a forward; empty if nothing.

    All processes must run such a forward as often as the others, with the same operators.
    """
    if stages_group(model) is not None:
        return "the model is a stage of a pipeline, whose forward waits for other processes"
    for module in model.modules():
        if division_of(module) is not None:
            return "tensor or expert parallelism divides the model, whose processes exchange activations in a forward"
        if is_sharded(module):
            return "the weights are sharded, and gathered from other processes block by block in a forward"
    return ""
