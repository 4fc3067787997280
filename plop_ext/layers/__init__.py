"""The layers that can be scored: adapters that find the W, input, output and bias of a module of each class."""

from plop_ext.layers.adapter import LayerAdapter, Part, Unsupported, adapter_for, register_adapter
from plop_ext.layers.communication import why_communicating
from plop_ext.layers.discovery import Discovery, LinearLayer, discover
from plop_ext.layers.linear import is_plain_product
from plop_ext.layers.offload import Elsewhere, bias_in_place, weights_elsewhere, weights_in_place
from plop_ext.layers.product_adapter import ProductAdapter
from plop_ext.layers.scope import SCOPES
from plop_ext.layers.sharded import Division, at_rest, divided_over, division_of, partners_of, whole_size
from plop_ext.layers.split import Split
from plop_ext.layers.stages import Stage, discover_whole, held_here, spread, stage_of, stages_group
from plop_ext.layers.walk import base_model, base_modules, plain_class, runnable, wrapped_modules

__all__ = [
    "SCOPES",
    "Discovery",
    "Division",
    "Elsewhere",
    "LayerAdapter",
    "LinearLayer",
    "Part",
    "ProductAdapter",
    "Split",
    "Stage",
    "Unsupported",
    "adapter_for",
    "at_rest",
    "base_model",
    "base_modules",
    "bias_in_place",
    "discover",
    "discover_whole",
    "divided_over",
    "division_of",
    "held_here",
    "is_plain_product",
    "partners_of",
    "plain_class",
    "register_adapter",
    "runnable",
    "spread",
    "stage_of",
    "stages_group",
    "weights_elsewhere",
    "weights_in_place",
    "whole_size",
    "why_communicating",
    "wrapped_modules",
]
