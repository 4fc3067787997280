"""Which rank reads which batches, and whether forwards are collectives."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Layout:
    """The places of the ranks in a run.

    Attributes:
        places: Place of each rank in the rounds of batches. Ranks of one place hold parts of one model, and run the
            same batches.
        collective: Whether the ranks exchange weights or activations in a forward, so that all must run as many.
    """

    places: tuple[int, ...]
    collective: bool = False

    @property
    def size(self) -> int:
        """Number of batches that run at the same time."""
        return max(self.places) + 1

    @cached_property
    def speakers(self) -> tuple[int, ...]:
        """The rank that gives the numbers of each place."""
        return tuple(self.places.index(place) for place in range(self.size))

    def split(self, values: Sequence[Any]) -> list[list[Any]]:
        """Return the values of the ranks of each place."""
        return [
            [value for value, mine in zip(values, self.places, strict=True) if mine == place]
            for place in range(self.size)
        ]


def layout_of(model: nn.Module, partners: Sequence[Collection[int]]) -> Layout:
    """Return the layout of the ranks that hold `model`.

    Args:
        model: What this rank holds.
        partners: For each rank, the ranks with which it holds parts of one replica, itself included.
    """
    roots = list(range(len(partners)))
    for rank, others in enumerate(partners):
        for other in others:
            if other < len(roots):
                old, new = sorted((roots[rank], roots[other]), reverse=True)
                roots = [new if root == old else root for root in roots]
    places = {root: place for place, root in enumerate(dict.fromkeys(roots))}
    divided = len(places) < len(roots)
    return Layout(tuple(places[root] for root in roots), divided or _gathers_weights(model))


def _gathers_weights(model: nn.Module) -> bool:
    """Return whether FSDP or ZeRO gathers weights in the forward."""
    shards = any(
        kind.__module__.startswith("torch.distributed.fsdp")
        for module in model.modules()
        for kind in type(module).__mro__
    )
    return shards or any(hasattr(parameter, "ds_id") for parameter in model.parameters())
