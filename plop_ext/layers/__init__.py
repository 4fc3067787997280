"""The one place that knows layer classes: what a module's W, input, output and bias are."""

from plop_ext.layers.adapter import LayerAdapter, Unsupported, adapter_for, register_adapter
from plop_ext.layers.discovery import Discovery, LinearLayer, Unscored, discover

__all__ = [
    "Discovery",
    "LayerAdapter",
    "LinearLayer",
    "Unscored",
    "Unsupported",
    "adapter_for",
    "discover",
    "register_adapter",
]
