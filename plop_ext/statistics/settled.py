"""The rule for an early stop: the set of chosen types, not its full order, is the same for other samples."""

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
    """Early stop of a scoring run: the run ends once the lowest types, or modules, are stable under resampling.

    They are stable if the set of the `types` (or `modules`) lowest is the same in a share of at least `confidence` of
    the bootstrap resamples of the samples.

    Attributes:
        types: Number of types that you will place.
        modules: Number of single modules (int), or fraction of them (float), that you will place instead of types.
        confidence: Share of the resamples that must give the same set.
        min_samples: Samples read before the first evaluation; default 4, and 64 for modules.
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
        """Return whether to evaluate the rule after `samples` samples, if it was last evaluated after `last`.

        Beyond 64 samples, it is evaluated only if the number of samples has grown by a quarter, because an evaluation
        costs time, and each evaluation is a chance to stop by luck.
        """
        return samples >= self.first_look and (samples <= MIN_SAMPLES_MODULES or samples >= 1.25 * last)


def set_stability(table: GainTable, rule: StopRule, seed: int = 0) -> float:
    """Return the share of resamples in which the lowest types or modules of `rule` are the same; 1 if they are all."""
    if table.samples < 2:
        return 0.0
    if rule.modules is None:
        values, k = types_over_samples(table, RESAMPLES, seed), rule.types
    else:
        order = table.module_nfn(table.all_samples)[0].argsort(kind="stable")
        values = modules_over_samples(table, RESAMPLES, seed)[:, order]
        k = max(1, round(rule.modules * len(order))) if isinstance(rule.modules, float) else rule.modules
    return 1.0 if k >= values.shape[1] else float(set_holds(values)[k - 1])
