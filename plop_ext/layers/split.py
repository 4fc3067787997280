"""The division of a packed weight's outputs into logical matrices: q, k and v, or gate and up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Column layout of a packed output: groups of `sum(sizes)` columns, each holding `sizes[i]` columns of part i.

    One group is the plain concatenation [q | k | v]; one group per head is GPT-NeoX's [q0 k0 v0 q1 k1 v1 ...]; sizes
    of (1, 1) are gpt-oss' interleaved gate and up.

    Attributes:
        names: Name of each part.
        sizes: Columns of each part in one group.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def fits(self, out_features: int) -> bool:
        """Return whether `out_features` columns are a whole number of groups."""
        return sum(self.sizes) > 0 and out_features % sum(self.sizes) == 0

    def features(self, out_features: int, part: int) -> int:
        """Return the columns of `part` in all groups."""
        return out_features // sum(self.sizes) * self.sizes[part]

    def select(self, values: Tensor, part: int) -> Tensor:
        """Return the columns of `part` among `values` [..., M], as a view [..., groups, size]."""
        start = sum(self.sizes[:part])
        return values.unflatten(-1, (-1, sum(self.sizes)))[..., start : start + self.sizes[part]]
