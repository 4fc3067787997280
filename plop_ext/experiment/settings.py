"""The settings of an experiment, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from plop_ext import quantities
from plop_ext.arguments import check_number, check_seed, check_type, check_whole, shown
from plop_ext.errors import InputError
from plop_ext.experiment.schedule import Schedule, full

RATES = (5e-4, 2e-3, 8e-3)
SEEDS = (0, 1, 2, 3, 4)
MARGIN = 0.01


@dataclass(frozen=True)
class Settings:
    """What a user chooses about an experiment; see `plop_ext.compare`, whose arguments these are.

    Raises:
        InputError: If a value is of another type or out of range.
    """

    learning_rates: Sequence[float] = RATES
    seeds: Sequence[int] = SEEDS
    max_steps: int = 300
    finalists: int | None = None
    widen: int = 2
    margin: float = MARGIN
    validation: float = 0.1
    r: int = 16
    alpha_over_r: int = 2
    batch_size: int = 16
    eval_batch_size: int = 32
    max_params: int | None = None
    max_seconds: float | None = None
    lora_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.max_params is not None:
            object.__setattr__(self, "max_params", quantities.count(self.max_params, "max_params"))
        sizes = {name: getattr(self, name) for name in ("r", "max_steps", "alpha_over_r", "batch_size")}
        check_whole(**sizes, eval_batch_size=self.eval_batch_size, required=True)
        check_whole(least=2, finalists=self.finalists)
        check_whole(least=0, widen=self.widen, required=True)
        check_number(above=0, margin=self.margin, required=True)
        check_number(above=0, max_seconds=self.max_seconds)
        check_number(validation=self.validation, required=True)
        if not 0 < self.validation < 1:
            raise InputError(f"`validation` must be above 0 and below 1, got {self.validation}")
        check_type((dict, type(None)), "a dict of fields of LoraConfig", lora_kwargs=self.lora_kwargs)
        for rate in _listed(self.learning_rates, "learning_rates"):
            check_number(above=0, learning_rates=rate, required=True)
        for seed in _listed(self.seeds, "seeds"):
            check_seed(seeds=seed)
        for name in ("learning_rates", "seeds"):
            _check_distinct(getattr(self, name), name)

    def wanted(self, candidates: int) -> Schedule:
        """Return the full grid, which is run unless the time is limited."""
        finalists = candidates if self.finalists is None else min(self.finalists, candidates)
        return full(sorted(self.learning_rates), self.seeds, self.max_steps, finalists, self.widen)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        lora = {name: repr(value) for name, value in (self.lora_kwargs or {}).items()}
        lists = {"learning_rates": sorted(self.learning_rates), "seeds": list(self.seeds)}
        return asdict(self) | lists | {"lora_kwargs": lora}


def _listed(values: Any, name: str) -> Sequence[Any]:
    """Return the values, which must be a list or another sequence, but no text."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise InputError(f"`{name}` must be a list of numbers, got {shown(values)}")
    return values


def _check_distinct(values: Sequence[Any], name: str) -> None:
    if not values or len(set(values)) < len(values):
        raise InputError(f"`{name}` must hold at least one value and none twice, got {list(values)}")
