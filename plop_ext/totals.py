"""The totals of a scoring run: what the kernels add up per module and sample, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# In the order of the last axis; csrc/gain_totals.h has the same.
TOTALS_FIELDS = ("sum_gain", "sum_gain_sq", "tokens", "skipped_zero", "skipped_nonfinite")

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums over the tokens of each module and sample.

    A name for each column of the array that kernels, journals and scores share; nothing is copied.

    Attributes:
        values: [M, S, F] float64, F as in `TOTALS_FIELDS`; without the axis of samples once it is summed over.
    """

    values: Floats

    def __post_init__(self) -> None:
        if self.values.shape[-1] != len(TOTALS_FIELDS):
            raise ValueError(f"totals must have {len(TOTALS_FIELDS)} fields, got {self.values.shape[-1]}")

    @classmethod
    def join_samples(cls, parts: Sequence[Totals]) -> Totals:
        """Append the samples of totals of the same modules."""
        return cls(np.concatenate([part.values for part in parts], axis=1))

    @classmethod
    def join_modules(cls, parts: Sequence[Totals]) -> Totals:
        """Append the modules of totals of the same samples."""
        return cls(np.concatenate([part.values for part in parts]))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Floats]) -> Totals:
        """Build totals from one array per field, all of one shape."""
        return cls(np.stack([fields[name] for name in TOTALS_FIELDS], axis=-1))

    @property
    def sum_gain(self) -> Floats:
        r"""[M, S] sum of the gains \(\lVert W z \rVert / \lVert z \rVert\) of the counted tokens."""
        return self._field("sum_gain")

    @property
    def sum_gain_sq(self) -> Floats:
        """[M, S] sum of the squared gains."""
        return self._field("sum_gain_sq")

    @property
    def tokens(self) -> Floats:
        """[M, S] counted tokens: they have a gain."""
        return self._field("tokens")

    @property
    def skipped_zero(self) -> Floats:
        """[M, S] tokens left out because their input is all zero."""
        return self._field("skipped_zero")

    @property
    def skipped_nonfinite(self) -> Floats:
        """[M, S] tokens left out because their input or output is NaN or infinite."""
        return self._field("skipped_nonfinite")

    @property
    def seen(self) -> Floats:
        """[M, S] tokens that reached the module, counted or left out."""
        return self.tokens + self.skipped_zero + self.skipped_nonfinite

    @property
    def mean_gain(self) -> Floats:
        """[M, S] mean gain of the counted tokens; NaN without any."""
        empty = np.full(self.tokens.shape, np.nan)
        return np.divide(self.sum_gain, self.tokens, out=empty, where=self.tokens > 0)

    def fields(self) -> dict[str, Floats]:
        """Return [M, S] of each field, by name."""
        return {name: self._field(name) for name in TOTALS_FIELDS}

    def sum_samples(self) -> Totals:
        """Add the samples of each module: every field becomes [M]."""
        return Totals.from_fields({name: field.sum(axis=1) for name, field in self.fields().items()})

    def of_modules(self, chosen: Any) -> Totals:
        """Select modules by anything that indexes an array axis."""
        return Totals(self.values[chosen])

    def of_samples(self, chosen: Any) -> Totals:
        """Select samples by anything that indexes an array axis."""
        return Totals(self.values[:, chosen])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Floats:
        """Let numpy read the totals as their array."""
        return np.array(self.values, dtype=dtype, copy=copy)

    def _field(self, name: str) -> Floats:
        field: Floats = self.values[..., TOTALS_FIELDS.index(name)]
        return field
