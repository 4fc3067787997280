"""Files of scores and placements, made without a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from plop_ext.score_data import ScoredModule
from plop_ext.scores import Scores
from tests.support.made_scores import made
from tests.support.scored_modules import scored_module
from tests.support.totals import make_totals

TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")


def ranked(layers: int = 4, samples: int = 8, types: tuple[str, ...] = TYPES) -> Scores:
    """Scores with a clear ranking, in the order of `types`, and some scatter over layers and samples."""
    generator = np.random.default_rng(0)
    modules: list[ScoredModule] = []
    for layer in range(layers):
        for label in types:
            modules.append(scored_module(f"model.layers.{layer}.{label}", label, layer, 32, 32, 1.0, 4.0))
    count = len(modules)
    tokens = np.full((count, samples), 100.0)
    level = np.tile(0.5 + 0.4 * np.arange(len(types)), layers)[:, None]
    gain = tokens * level * generator.uniform(0.95, 1.05, (count, samples))
    totals = make_totals(count, samples, sum_gain=gain, sum_gain_sq=gain**2 / tokens, tokens=tokens)
    model = {"class": "Made", "name": "made", "parameters": 10**6, "weight_bytes": 4 * 10**6, "dtype": "float32"}
    return made(
        modules=tuple(modules),
        totals=totals,
        sample_ids=np.arange(samples),
        sample_batches=np.arange(samples) // 4,
        provenance={"settings": {"compat": None}, "model": model, "data": {"name": "d", "samples": samples}},
    )


def save_scores(folder: Path) -> Path:
    """Write scores of a clear ranking, and return their file."""
    path = folder / "scores.json"
    ranked().save(path)
    return path


def save_placement(folder: Path) -> Path:
    """Write a placement, and return its file."""
    path = folder / "placement.json"
    ranked().place(types=3).save(path)
    return path


def save_others(folder: Path) -> Path:
    """Write scores of other data that can be merged with those of `save_scores`, and return their file."""
    path, scores = folder / "others.json", ranked()
    data = {**scores.provenance["data"], "name": "other"}
    replace(scores, provenance={**scores.provenance, "data": data}).save(path)
    return path
