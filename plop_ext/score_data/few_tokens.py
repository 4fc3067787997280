"""Modules that have no score yet, and may have one once runs are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from plop_ext.scores.scores import ScoredModule


@dataclass(frozen=True, eq=False)
class ThinModules:
    """Expert projections that too few tokens were routed to for a score, kept for `Scores.merge`.

    Attributes:
        modules: What they are.
        totals: [N, S, 5] float64: their sums, as in `Scores.totals`.
        positions: Place of each among the scored modules and these, in the model's order.
    """

    modules: tuple[ScoredModule, ...]
    totals: NDArray[np.float64]
    positions: tuple[int, ...]
