"""What the stages of a pipeline tell each other before a run: norms and baselines of the layers that each holds."""

from __future__ import annotations

from collections.abc import Sequence

from plop_ext.layers import LinearLayer, Stage, spread
from plop_ext.scoring.baseline import WeightNorms


def union_of_stages(
    stage: Stage | None, layers: Sequence[LinearLayer], norms: WeightNorms, baselines: Sequence[float]
) -> tuple[WeightNorms, list[float]]:
    """Return norms and baselines of all `layers`, from those of the layers that this process holds."""
    if stage is None:
        return norms, list(baselines)
    failures = {name: reason for part in stage.gathered(norms.failures) for name, reason in part.items()}
    whole = WeightNorms(stage.added(list(spread(layers, norms.values))), failures)
    return whole, stage.added(list(spread(layers, baselines)))
