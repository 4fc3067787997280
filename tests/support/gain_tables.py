"""Constructed totals: tables, and scores of a toy model made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plop_ext.scores import Scores
from plop_ext.statistics import GainTable
from tests.support.scored_modules import scored_module
from tests.support.totals import make_totals

NAMES = ("a", "b", "c", "d", "e", "f", "g")


def table(
    levels: Sequence[float],
    *,
    layers: int = 12,
    samples: int = 32,
    layer_sd: float = 0.0,
    sample_sd: float = 0.02,
    own_layer_sd: float = 0.0,
    changes: Mapping[tuple[int, int], float] | None = None,
    out_features: int = 4096,
    seed: int = 0,
) -> GainTable:
    """One module per type and layer; `levels` are the types' NFN.

    Args:
        levels: NFN of each type.
        layers: Layers.
        samples: Samples of 50 to 150 tokens.
        layer_sd: Relative scatter over layers that all types share.
        sample_sd: Relative scatter over samples, of each module on its own.
        own_layer_sd: Relative scatter over layers of each type on its own.
        changes: (type, layer) to a factor.
        out_features: Rows of every weight.
        seed: Of everything random.
    """
    rng = np.random.default_rng(seed)
    shared = 1 + layer_sd * _standard(rng, (layers,))
    nfn = np.array(levels)[:, None] * shared * (1 + own_layer_sd * _standard(rng, (len(levels), layers)))
    for place, factor in (changes or {}).items():
        nfn[place] *= factor
    tokens = rng.integers(50, 150, size=samples).astype(np.float64)
    modules = nfn.size
    gains = nfn.reshape(-1, 1) * (1 + sample_sd * rng.standard_normal((modules, samples)))
    return GainTable.make(
        gains * tokens,
        np.tile(tokens, (modules, 1)),
        np.ones(modules),
        np.full(modules, float(out_features)),
        [NAMES[t] for t in range(len(levels)) for _ in range(layers)],
        [layer for _ in levels for layer in range(layers)],
    )


def irregular(samples: int = 7, seed: int = 0) -> GainTable:
    """A table in which no two things are alike.

    Modules have no tokens in some samples. A type has several modules in one layer. Types are in the same layers, in
    others, in a single one and outside the blocks, and none is named in the order of the ranking.
    """
    rng = np.random.default_rng(seed)
    places = [(label, layer) for layer in range(4) for label in ("q", "k")]
    places += [("up", layer) for layer in (0, 4, 4, 5, 5, 5)] + [("head", None), ("gate", 3)]
    modules = len(places)
    tokens = rng.integers(0, 4, size=(modules, samples)).astype(np.float64)
    tokens[:, 0] += 1
    # Of a type that is a single module, every sample has tokens.
    tokens[-2:] += 1
    level = {"q": 1.5, "k": 1.4, "up": 1.2, "head": 2.0, "gate": 0.7}
    gains = np.array([level[label] for label, _ in places])[:, None] * rng.uniform(0.5, 1.5, size=tokens.shape)
    return GainTable.make(
        gains * tokens,
        tokens,
        rng.uniform(0.9, 1.1, size=modules),
        rng.integers(16, 64, size=modules).astype(np.float64),
        [label for label, _ in places],
        [layer for _, layer in places],
    )


def scores(source: GainTable, *, data: str | None = "toy", first_id: int = 0, **model: Any) -> Scores:
    """Scores with the totals of `source`, of square modules in float32."""
    modules = tuple(
        scored_module(f"layers.{layer}.{source.types[t]}", source.types[t], int(layer), 64, int(rows), 1.0, 8.0)
        for t, layer, rows in zip(source.type_index, source.layer, source.out_features, strict=True)
    )
    gain_sq = np.divide(source.sum_gain**2, source.tokens, where=source.tokens > 0, out=np.zeros_like(source.sum_gain))
    totals = make_totals(
        len(modules), source.samples, sum_gain=source.sum_gain, sum_gain_sq=gain_sq, tokens=source.tokens
    )
    provenance = {
        "model": {"class": "Toy", "parameters": 1_000_000, "weight_bytes": 4_000_000, "dtype": "float32", **model},
        "data": {"name": data, "samples": source.samples},
        "settings": {"compat": None, "mask": "attention", "baseline": "frobenius"},
        "seconds": 1.0,
    }
    ids = np.arange(first_id, first_id + source.samples)
    return Scores(modules, totals, ids, np.arange(source.samples) // 8, (), provenance)


def _standard(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal draws with mean exactly 0 over the last axis, so that the levels are the types' NFN."""
    values = rng.standard_normal(shape)
    return values - values.mean(axis=-1, keepdims=True)
