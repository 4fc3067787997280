"""The evaluation of the stop rule on the totals of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plop_ext.layers import LinearLayer
from plop_ext.score_data.modules import MIN_EXPERT_TOKENS
from plop_ext.statistics import GainTable, StopRule, set_stability
from plop_ext.totals import Totals


class StopWatch:
    """Applies a `StopRule` to the totals received so far.

    Args:
        rule: The rule.
        layers: The scored layers.
        baseline: [M] baselines of the layers.
    """

    def __init__(self, rule: StopRule, layers: Sequence[LinearLayer], baseline: Sequence[float]) -> None:
        self.rule = rule
        self.settled = False
        self.stability: float | None = None
        self._layers = layers
        self._baseline = np.array(baseline)
        self._last = 0

    def first_is_due(self, samples: int) -> bool:
        """Return whether `samples` are enough for the first evaluation, and there was none yet."""
        return self._last == 0 and samples >= self.rule.first_look

    def look(self, tables: Sequence[Totals], samples: int) -> bool:
        """Return whether the rule is met on the batches so far, with `samples` in total."""
        if self.settled or not self.rule.is_due(samples, self._last):
            return self.settled
        self._last = samples
        table = self._table(Totals.join_samples(tables))
        if table is not None:
            self.stability = set_stability(table, self.rule)
            self.settled = self.stability >= self.rule.confidence
        return self.settled

    def report(self, samples: int, available: int | None) -> dict[str, Any]:
        """Return how much data was needed, for the provenance."""
        return {
            "rule": "settled",
            "types": self.rule.types if self.rule.modules is None else None,
            "modules": self.rule.modules,
            "confidence": self.rule.confidence,
            "settled": self.settled,
            "settled_at": self._last if self.settled else None,
            "stability": self.stability,
            "samples": samples,
            "available": available,
        }

    def _table(self, totals: Totals) -> GainTable | None:
        experts = np.array([layer.adapter.routed for layer in self._layers])
        competes = np.array([not layer.no_place for layer in self._layers])
        seen = totals.tokens.sum(axis=1) >= np.where(experts, MIN_EXPERT_TOKENS, 1)
        kept = np.flatnonzero(competes & seen & np.isfinite(self._baseline) & (self._baseline > 0))
        if not len(kept):
            return None
        layers = [self._layers[i] for i in kept.tolist()]
        return GainTable.of_modules(totals.of_modules(kept), self._baseline[kept], layers)
