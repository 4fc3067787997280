"""The rule for an early stop: the set of chosen types, not its full order, is the same for other samples."""

from __future__ import annotations

from dataclasses import dataclass

from plop_ext import quantities
from plop_ext.arguments import check_number, check_whole
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
        types: Number of types that you will place; default 3, or None with `modules`.
        modules: Number of single modules (int, `"1k"`), or share of them (float, `"5%"`), that you will place instead
            of types.
        confidence: Share of the resamples that must give the same set.
        min_samples: Samples read before the first evaluation; default 4, and 64 for modules.
    """

    types: int | None = None
    modules: int | float | str | None = None
    confidence: float = 0.99
    min_samples: int | None = None

    def __post_init__(self) -> None:
        check_whole(types=self.types)
        check_number(above=0.5, most=1, confidence=self.confidence, required=True)
        check_whole(least=2, min_samples=self.min_samples)
        if self.modules is not None:
            if self.types is not None:
                raise InputError("`types` and `modules` of the stop rule exclude each other; give one")
            object.__setattr__(self, "modules", quantities.count_or_share(self.modules, "modules"))
        elif self.types is None:
            object.__setattr__(self, "types", DEFAULT_TYPES)

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
        assert rule.types is not None
        values, k = types_over_samples(table, RESAMPLES, seed), rule.types
    else:
        order = table.module_nfn(table.all_samples)[0].argsort(kind="stable")
        values = modules_over_samples(table, RESAMPLES, seed)[:, order]
        assert not isinstance(rule.modules, str)  # replaced by the number that it stands for
        k = max(1, round(rule.modules * len(order))) if isinstance(rule.modules, float) else rule.modules
    return 1.0 if k >= values.shape[1] else float(set_holds(values)[k - 1])
