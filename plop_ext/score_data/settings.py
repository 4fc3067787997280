"""The settings of a scoring run: which modules and tokens count, and with which baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

from plop_ext.arguments import MOST_PROBES, MOST_SAMPLES, check_choice, check_type, check_whole
from plop_ext.module_types import as_patterns

_CHOICES = {"mask": ("attention", "completion", "all"), "baseline": ("frobenius", "probe")}
# Runs that differ in these settings still measure the same: the settings choose modules, which a merge compares by
# name, and how much of the data is read.
_MAY_DIFFER = {"scope", "max_samples", "token_step", "seed"}


@dataclass(frozen=True)
class Settings:
    """The settings of a scoring run, in memory or streamed; see `plop_ext.score` for each.

    Journals, the states of streamed runs and merges compare the settings; scores record them in their provenance.

    Raises:
        InputError: If a setting is out of range; the message names it.
    """

    mask: str
    baseline: str
    probes: int
    include: str | Sequence[str] | None
    exclude: str | Sequence[str]
    scope: str
    max_samples: int | None
    token_step: int
    seed: int
    compat: str | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(choices, **{name: getattr(self, name)})
        check_type(str, "a part of the model, such as 'language' or 'all'", scope=self.scope)
        check_choice((None, "paper-script"), compat=self.compat)
        check_whole(token_step=self.token_step, required=True)
        check_whole(most=MOST_SAMPLES, max_samples=self.max_samples)
        check_whole(most=MOST_PROBES, probes=self.probes, required=True)
        check_whole(least=-(2**63), seed=self.seed, required=True)
        for name in ("max_samples", "token_step", "probes", "seed"):
            value = getattr(self, name)
            if isinstance(value, Integral):  # numpy's integers cannot be written as JSON
                object.__setattr__(self, name, int(value))
        if self.include is not None:
            object.__setattr__(self, "include", as_patterns(self.include, "include"))
        object.__setattr__(self, "exclude", as_patterns(self.exclude, "exclude"))
        if self.compat == "paper-script":
            for name, value in {"mask": "all", "baseline": "probe", "token_step": 1}.items():
                object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name, for provenance and comparisons; `probes` is None where none are drawn."""
        return {**vars(self), "probes": self.probes if self.baseline == "probe" else None}


NAMES = tuple(field.name for field in fields(Settings))
# Settings that must be equal for runs to be merged.
MUST_AGREE = tuple(name for name in NAMES if name not in _MAY_DIFFER)
