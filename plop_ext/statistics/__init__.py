"""How certain a ranking is: pure functions of the [module, sample] totals, seeded and vectorized. No model, no torch.

There are two uncertainties. Over the data: other samples of the same task would give other totals. Over the layers: a
type's NFN is the mean of modules that differ by far more than the data error, so another model of the family could
rank close types in the opposite order. The first uncertainty alone makes every difference look certain.
"""

from __future__ import annotations

from plop_ext.statistics.boundaries import DEFAULT_TYPES, AutoK, Boundary, auto_k
from plop_ext.statistics.settled import MIN_SAMPLES_MODULES, StopRule, set_stability
from plop_ext.statistics.signal import Signal, find_signal
from plop_ext.statistics.summary import Statistics, Tie, TypeStatistics, summarize
from plop_ext.statistics.table import GainTable

__all__ = [
    "DEFAULT_TYPES",
    "MIN_SAMPLES_MODULES",
    "AutoK",
    "Boundary",
    "GainTable",
    "Signal",
    "Statistics",
    "StopRule",
    "Tie",
    "TypeStatistics",
    "auto_k",
    "find_signal",
    "set_stability",
    "summarize",
]
