"""Scores without what scoring says of small data and tiny models."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

import plop_ext
from plop_ext import Scores

# Others pass, so that a test can expect them.
_OF_SMALL_DATA = ".*(fewer than .* tokens|NaN or infinite|not scored: |have an input of zeros)"


def quietly(model: nn.Module, batches: Sequence[Any], **settings: Any) -> Scores:
    """The scores of all of `batches`."""
    return _run(plop_ext.score, model, batches, settings)


def stream_quietly(folder: Any, batches: Sequence[Any], **settings: Any) -> Scores:
    """The scores of all of `batches` by the checkpoint in `folder`, streamed."""
    return _run(plop_ext.score_streaming, str(folder), batches, settings)


def nfn(scores: Scores) -> dict[str, float]:
    """Name of each scored module to its NFN."""
    return dict(zip(scores.module_names, scores.nfn.tolist(), strict=True))


def _run(run: Any, model: Any, batches: Sequence[Any], settings: dict[str, Any]) -> Scores:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_OF_SMALL_DATA)
        scores: Scores = run(model, batches, **{"max_samples": None, "progress": False, **settings})
    return scores
