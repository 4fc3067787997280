"""Routers and gates, which choose where an activation goes or how much of it passes, and get no LoRA."""

from __future__ import annotations

from torch import nn

ROUTER = "a router: it chooses the experts, and an adapter on it would change the choice"
# For M = 1, E|w z| / ||z|| over ||w|| / sqrt(K) is E|N(0, 1)|, which is 0.80.
SINGLE_OUTPUT = "a single output, as gates have: its NFN is 0.80 instead of 1 if its input is noise"

_NAMES = ("router", "gate")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def is_router_class(module: nn.Module) -> bool:
    """Return whether the name of the class ends in router or gate."""
    return type(module).__name__.lower().endswith(_NAMES)


def reason_against(name: str, out_features: int, in_block: bool, config: object) -> str:
    """Return why a linear layer is a router or a gate; empty if it is neither.

    Args:
        name: Full module name.
        out_features: M.
        in_block: Whether the layer is in a repeated block; a head outside of them may have a single output.
        config: The nearest configuration, from which the number of experts is read.
    """
    if in_block and out_features == 1:
        return SINGLE_OUTPUT
    leaves = name.lower().split(".")[-2:]  # Switch keeps its matrix in `router.classifier`
    return ROUTER if out_features <= _experts(config) and any(leaf.endswith(_NAMES) for leaf in leaves) else ""


def _experts(config: object) -> int:
    counts = [getattr(config, field, None) for field in _EXPERTS]
    return max((count for count in counts if isinstance(count, int)), default=0)
