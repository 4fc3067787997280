"""Routers, which choose the experts of a token, and are not scored."""

from __future__ import annotations

from torch import nn

from plop_ext.layers.attributes import attribute

ROUTER = "a router: it chooses the experts, and an adapter on it would change the choice"

_NAMES = ("router", "gate")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def is_router_class(module: nn.Module) -> bool:
    """Return whether the name of the class ends in router or gate."""
    return type(module).__name__.lower().endswith(_NAMES)


def is_router(name: str, out_features: int, config: object) -> bool:
    """Return whether a linear layer is a router: by its name, with two outputs to one for each expert.

    Args:
        name: Full module name.
        out_features: M.
        config: The nearest configuration, from which the number of experts is read.
    """
    leaves = name.lower().split(".")[-2:]  # Switch keeps its matrix in `router.classifier`
    return 1 < out_features <= _experts(config) and any(leaf.endswith(_NAMES) for leaf in leaves)


def _experts(config: object) -> int:
    counts = [attribute(config, field) for field in _EXPERTS]  # some raise if layers differ
    return max((count for count in counts if isinstance(count, int)), default=0)
