"""Weights of which this process holds only a shard, or nothing, outside of their module's forward.

Three libraries shard weights, each in its own way: `fully_shard` and tensor parallelism hold a `DTensor`, FSDP 1 holds
a piece of a flat parameter or a view of released memory, DeepSpeed's ZeRO-3 holds an empty parameter. A module is
sharded if one of them shards a parameter of its own. Every function here that reads the values of a sharded module is
a collective: all processes that hold a shard have to call it, for the same modules in the same order.
"""

from plop_ext.layers.sharded.division import Division, divided_over, division_of, partners_of
from plop_ext.layers.sharded.row_sums import row_sums
from plop_ext.layers.sharded.styles import runs_whole_batch, without_style
from plop_ext.layers.sharded.units import at_rest, whole_size
from plop_ext.layers.sharded.whole import gathered, is_sharded, shapes_known, shard_of, why_not_readable

__all__ = [
    "Division",
    "at_rest",
    "divided_over",
    "division_of",
    "gathered",
    "is_sharded",
    "partners_of",
    "row_sums",
    "runs_whole_batch",
    "shapes_known",
    "shard_of",
    "whole_size",
    "why_not_readable",
    "without_style",
]
