"""Scores made by hand, with totals that are easily added up."""

from __future__ import annotations

from typing import Any

import numpy as np

from plop_ext.score_data import FewTokenModules
from plop_ext.scores import Scores
from plop_ext.unscored import UnscoredModule
from tests.support.scored_modules import scored_module
from tests.support.totals import make_totals

TOTALS = make_totals(
    3,
    2,
    sum_gain=[[6.0, 2.0], [8.0, 4.0], [3.0, 0.0]],
    sum_gain_sq=[[20.0, 4.0], [40.0, 16.0], [9.0, 0.0]],
    tokens=[[2.0, 2.0], [4.0, 2.0], [1.0, 0.0]],
    skipped_zero=[[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]],
    skipped_nonfinite=[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
)


def made(compat: str | None = None, **changes: Any) -> Scores:
    """Three modules of two types on two samples."""
    fields: dict[str, Any] = {
        "modules": (
            scored_module("layers.0.q_proj", "q_proj", 0, 4, 8, 0.5, 2.0),
            scored_module("layers.1.q_proj", "q_proj", 1, 4, 8, 2.0, 4.0),
            scored_module("layers.0.up_proj", "up_proj", 0, 4, 16, 1.5, None),
        ),
        "totals": TOTALS,
        "sample_ids": np.array([7, 3]),
        "sample_batches": np.array([0, 1]),
        "unscored": (UnscoredModule("lm_head", "Linear", "outside the repeated blocks"),),
        "provenance": {
            "settings": {"compat": compat},
            "model": {"class": "Made"},
            "data": {"name": None, "samples": 2},
        },
    }
    return Scores(**{**fields, **changes})


def few_tokens(**changes: Any) -> FewTokenModules:
    """Two experts that saw 3 and 0 tokens, first and third of five in the order of the model of `made`."""
    fields: dict[str, Any] = {
        "modules": (
            scored_module("layers.0.experts.0", "experts", 0, 4, 6, 1.0, 3.0),
            scored_module("layers.0.experts.1", "experts", 0, 4, 6, 1.0, None),
        ),
        "totals": make_totals(2, 2, sum_gain=[[4.0, 2.0], [0.0, 0.0]], tokens=[[2.0, 1.0], [0.0, 0.0]]),
        "positions": (0, 2),
    }
    return FewTokenModules(**{**fields, **changes})
