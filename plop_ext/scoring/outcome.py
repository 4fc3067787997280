"""The numbers of a run, both in memory and streamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plop_ext.scoring.baseline import WeightNorms
from plop_ext.totals import Totals


@dataclass(frozen=True)
class Outcome:
    """The numbers of a run, layer by layer in the model's order, and observations about the layers.

    Attributes:
        totals: Sums over the tokens of each layer and sample.
        norms: Weight norms of the layers.
        baselines: Gains of the layers on random inputs.
        ids: Id of each sample.
        batches: Batch of each sample.
        unassigned: Layers with rows whose sample or padding cannot be told, and the reason.
        experts_implementation: The model's own implementation of stacked experts; a run uses the grouped one.
    """

    totals: Totals
    norms: WeightNorms
    baselines: Sequence[float]
    ids: Sequence[int]
    batches: Sequence[int]
    unassigned: Mapping[str, str]
    experts_implementation: str | None
