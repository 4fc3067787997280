"""What a run measures, whether the model runs as a whole or block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from plop_ext.scoring.baseline import WeightNorms
from plop_ext.totals import Totals


@dataclass(frozen=True)
class Outcome:
    """The numbers of a run, layer by layer in the model's order, and what was noticed on the way.

    Attributes:
        totals: Sums over the tokens of each layer and sample.
        norms: Weight norms of the layers.
        baselines: The layers' gains on random inputs.
        ids: Each sample's id.
        batches: The batch each sample was in.
        unmasked: Layers of which all rows count, because these are not the tokens of the mask.
        unassigned: Layers of which some rows belong to no sample, and why.
        experts_implementation: The model's own way to run stacked experts, which a run groups to observe each.
    """

    totals: Totals
    norms: WeightNorms
    baselines: Sequence[float]
    ids: Sequence[int]
    batches: Sequence[int]
    unmasked: Set[str]
    unassigned: Mapping[str, str]
    experts_implementation: str | None
