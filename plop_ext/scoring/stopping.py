"""The evaluation of the stop rule on the totals of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plop_ext.layers import LinearLayer
from plop_ext.score_data.modules import MIN_EXPERT_TOKENS
from plop_ext.statistics import GainTable, StopRule, set_stability
from plop_ext.totals import Totals

# Once the choice has settled, a run reads on for experts with too few tokens, until it has read this many samples and
# this many times as many as the choice needed. Some experts are never chosen by the data.
_MOST_FOR_EXPERTS = 64
_TIMES_FOR_EXPERTS = 4


class StopWatch:
    """Applies a `StopRule` to the totals received so far.

    A type counts only as far as its modules have tokens. Therefore a run does not stop while experts have too few
    tokens for a score, within a limit.

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
        self._stable_since: int | None = None
        self._experts = np.array([layer.adapter.routed for layer in self._layers])
        self._competes = np.array([not layer.no_place for layer in self._layers])

    def first_is_due(self, samples: int) -> bool:
        """Return whether `samples` are enough for the first evaluation, and there was none yet."""
        return self._last == 0 and samples >= self.rule.first_look

    def look(self, tables: Sequence[Totals], samples: int) -> bool:
        """Return whether the rule is met on the batches so far, with `samples` in total."""
        if self.settled or not self.rule.is_due(samples, self._last):
            return self.settled
        self._last = samples
        totals = Totals.join_samples(tables)
        enough = totals.tokens.sum(axis=1) >= np.where(self._experts, MIN_EXPERT_TOKENS, 1)
        table = self._table(totals, enough)
        if table is not None:
            self.stability = set_stability(table, self.rule)
            stable = self.stability >= self.rule.confidence
            if stable and self._stable_since is None:
                self._stable_since = samples
            self.settled = stable and not self._waits_for_experts(enough, samples)
        return self.settled

    def _waits_for_experts(self, enough: NDArray[np.bool_], samples: int) -> bool:
        """Return whether to read on, because experts have too few tokens and the limit is not reached."""
        first = self._stable_since or samples
        within = samples < max(_MOST_FOR_EXPERTS, _TIMES_FOR_EXPERTS * first)
        return within and bool((self._experts & self._competes & ~enough).any())

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

    def _table(self, totals: Totals, enough: NDArray[np.bool_]) -> GainTable | None:
        kept = np.flatnonzero(self._competes & enough & np.isfinite(self._baseline) & (self._baseline > 0))
        if not len(kept):
            return None
        layers = [self._layers[i] for i in kept.tolist()]
        return GainTable.of_modules(totals.of_modules(kept), self._baseline[kept], layers)
