"""NFN arranged by layer and type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plop_ext.score_data.data import ScoreData


def layer_grid(scores: ScoreData, types: Sequence[str]) -> tuple[list[int | str], np.ndarray[Any, Any]]:
    """Return [layers, types] mean NFN, NaN where a layer lacks a type; modules outside blocks are the last row."""
    indexed = sorted({module.layer for module in scores.modules if module.layer is not None})
    layers: list[int | str] = list(indexed)
    if any(module.layer is None for module in scores.modules):
        layers.append("-")
    rows = {layer: row for row, layer in enumerate(layers)}
    columns = {label: column for column, label in enumerate(types)}
    sums, counts = np.zeros((len(layers), len(types))), np.zeros((len(layers), len(types)))
    for module, value in zip(scores.modules, scores.nfn.tolist(), strict=True):
        # The published script groups by parts of names, so a module may be in several groups.
        labels = [label for label in types if label in module.name] if scores.paper_script else [module.type]
        for column in [columns[label] for label in labels if label in columns]:
            place = rows["-" if module.layer is None else module.layer], column
            sums[place] += value
            counts[place] += 1
    return layers, np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
