"""When scoring may stop: when the chosen set, not its full order, no longer depends on which samples were seen."""

from __future__ import annotations

from dataclasses import dataclass

from plop_ext.errors import InputError
from plop_ext.statistics.boundaries import DEFAULT_TYPES
from plop_ext.statistics.resampling import RESAMPLES, modules_over_samples, types_over_samples
from plop_ext.statistics.stability import set_holds
from plop_ext.statistics.table import GainTable

MIN_SAMPLES = 4
MIN_SAMPLES_MODULES = 64


@dataclass(frozen=True)
class StopRule:
    """Stop once the `types` (or `modules`) lowest are the same in `confidence` of the bootstrap resamples of samples.

    Attributes:
        types: Number of types that you will place.
        modules: Number of single modules, or fraction of them, to place instead of types.
        confidence: Share of the resamples that must agree.
        min_samples: Samples seen before the first evaluation; default 4, and 64 for modules.
    """

    types: int = DEFAULT_TYPES
    modules: int | float | None = None
    confidence: float = 0.99
    min_samples: int | None = None

    def __post_init__(self) -> None:
        if self.types < 1:
            raise InputError(f"`types` of the stop rule must be at least 1, got {self.types}")
        if not 0.5 < self.confidence <= 1:
            raise InputError(f"`confidence` of the stop rule must be above 0.5 and at most 1, got {self.confidence}")
        if self.modules is not None and self.modules <= 0:
            raise InputError(f"`modules` of the stop rule must be above 0, got {self.modules}")
        if self.min_samples is not None and self.min_samples < 2:
            raise InputError(f"`min_samples` of the stop rule must be at least 2, got {self.min_samples}")

    @property
    def first_look(self) -> int:
        """Samples before the first evaluation."""
        if self.min_samples is not None:
            return self.min_samples
        return MIN_SAMPLES if self.modules is None else MIN_SAMPLES_MODULES

    def is_due(self, samples: int, last: int) -> bool:
        """Return whether to evaluate the rule at `samples`, after the last evaluation at `last`.

        Beyond 64 samples, only if their number has grown by a quarter: an evaluation costs time, and each is a chance
        to stop by luck.
        """
        return samples >= self.first_look and (samples <= MIN_SAMPLES_MODULES or samples >= 1.25 * last)


def set_stability(table: GainTable, rule: StopRule, seed: int = 0) -> float:
    """Return the share of resamples in which the set of `rule` is the same; 1 if the set holds everything."""
    if table.samples < 2:
        return 0.0
    if rule.modules is None:
        values, k = types_over_samples(table, RESAMPLES, seed), rule.types
    else:
        order = table.module_nfn(table.all_samples)[0].argsort(kind="stable")
        values = modules_over_samples(table, RESAMPLES, seed)[:, order]
        k = max(1, round(rule.modules * len(order))) if isinstance(rule.modules, float) else rule.modules
    return 1.0 if k >= values.shape[1] else float(set_holds(values)[k - 1])
