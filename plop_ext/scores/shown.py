"""What notebooks and trackers show of scores."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from plop_ext.score_data import ScoreData
from plop_ext.score_data.grid import layer_grid
from plop_ext.score_data.types import metric_names
from plop_ext.tables import html_table

_MOST_TYPES = 30
_MOST_LAYERS = 200


def line(scores: ScoreData) -> str:
    """Return class, size and lowest types of scores, in angle brackets."""
    types = scores.by_type()
    lowest = ", ".join(f"{score.type} {score.nfn:.3f}" for score in types[:3])
    more = ", ..." if len(types) > 3 else ""
    model = scores.provenance.get("model", {}).get("class", "a model")
    return (
        f"<{type(scores).__name__} of {model}: {len(scores.modules):,} modules of {len(types)} types on "
        f"{len(scores.sample_ids):,} samples, {scores.tokens:,} tokens; lowest NFN: {lowest}{more}>"
    )


def html(scores: ScoreData) -> str:
    """Return the types, lowest NFN first, and NFN by layer and type, darker where it is lower."""
    types = scores.by_type()[:_MOST_TYPES]
    table = html_table(
        ["type", "NFN", "lowest", "highest", "modules"],
        [
            [score.type, f"{score.nfn:.4f}", f"{score.lowest:.4f}", f"{score.highest:.4f}", f"{score.modules:,}"]
            for score in types
        ],
    )
    head = line(scores).strip("<>").partition("; lowest")[0]
    return f"<b>{escape(head)}</b>{table}<details><summary>NFN by layer</summary>{_heatmap(scores, types)}</details>"


def _heatmap(scores: ScoreData, types: Any) -> str:
    labels = [score.type for score in types]
    layers, grid = layer_grid(scores, labels)
    layers, grid = layers[:_MOST_LAYERS], grid[:_MOST_LAYERS]
    low, high = np.nanmin(grid), np.nanmax(grid)
    shades = np.nan_to_num(0.8 * (high - grid) / max(high - low, 1e-12))
    cells = [
        [str(layer), *("" if np.isnan(value) else f"{value:.2f}" for value in row)]
        for layer, row in zip(layers, grid.tolist(), strict=True)
    ]
    return html_table(["layer", *labels], cells, shades.tolist())


def rows(scores: ScoreData) -> list[dict[str, Any]]:
    """Return name, type, sizes and scores of each module."""
    tokens = scores.totals.tokens.sum(axis=1).astype(np.int64).tolist()
    return [
        {
            "module": module.name,
            "type": module.type,
            "layer": module.layer,
            "nfn": nfn,
            "gain": gain,
            "baseline": module.baseline,
            "tokens": count,
            "in_features": module.in_features,
            "out_features": module.out_features,
            "kind": module.kind,
            "no_place": module.no_place,
        }
        for module, nfn, gain, count in zip(
            scores.modules, scores.nfn.tolist(), scores.gain.tolist(), tokens, strict=True
        )
    ]


def metrics(scores: ScoreData, prefix: str) -> dict[str, float]:
    """Return NFN by type, samples and tokens under names that every tracker takes."""
    nfn = metric_names({score.type: score.nfn for score in scores.by_type()})
    return {f"{prefix}nfn/{name}": value for name, value in nfn.items()} | {
        f"{prefix}samples": float(len(scores.sample_ids)),
        f"{prefix}tokens": float(scores.tokens),
    }
