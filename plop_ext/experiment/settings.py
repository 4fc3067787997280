"""The settings of an experiment, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from plop_ext import quantities
from plop_ext.arguments import check_seed, check_whole
from plop_ext.errors import InputError
from plop_ext.experiment.schedule import Schedule, full
from plop_ext.experiment.trial import Recipe


@dataclass(frozen=True)
class Settings:
    """What a user chooses about an experiment; see `plop_ext.compare`, whose arguments these are.

    Raises:
        InputError: If a value is out of range.
    """

    learning_rates: Sequence[float]
    seeds: Sequence[int]
    max_steps: int
    finalists: int | None
    widen: int
    margin: float
    validation: float
    r: int
    max_params: int | None
    recipe: Recipe

    def __post_init__(self) -> None:
        recipe = self.recipe
        if self.max_params is not None:
            object.__setattr__(self, "max_params", quantities.count(self.max_params, "max_params"))
        check_whole(r=self.r, max_steps=self.max_steps, alpha_over_r=recipe.alpha_over_r)
        check_whole(batch_size=recipe.batch_size, eval_batch_size=recipe.eval_batch_size)
        check_whole(least=2, finalists=self.finalists)
        check_whole(least=0, widen=self.widen)
        _check_distinct(self.learning_rates, "learning_rates")
        _check_distinct(self.seeds, "seeds")
        for seed in self.seeds:
            check_seed(seeds=seed)
        if not all(math.isfinite(rate) and rate > 0 for rate in self.learning_rates):
            raise InputError(f"`learning_rates` must be above 0, got {', '.join(map(str, self.learning_rates))}")
        if not 0 < self.validation < 1:
            raise InputError(f"`validation` must be above 0 and below 1, got {self.validation}")
        if not (math.isfinite(self.margin) and self.margin > 0):
            raise InputError(f"`margin` must be above 0, got {self.margin}")

    def wanted(self, candidates: int) -> Schedule:
        """Return the full grid, which is run unless the time is limited."""
        finalists = candidates if self.finalists is None else min(self.finalists, candidates)
        return full(sorted(self.learning_rates), self.seeds, self.max_steps, finalists, self.widen)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        fields = asdict(self)
        recipe = fields.pop("recipe")
        lora = {name: repr(value) for name, value in recipe.pop("lora_kwargs").items()}
        return {
            **fields,
            **recipe,
            "lora_kwargs": lora,
            "learning_rates": sorted(self.learning_rates),
            "seeds": list(self.seeds),
        }


def _check_distinct(values: Sequence[Any], name: str) -> None:
    if not values or len(set(values)) < len(values):
        raise InputError(f"`{name}` must hold at least one value and none twice, got {list(values)}")
