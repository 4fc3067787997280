"""What `score` refuses, what it warns of, and the kinds of data it takes. Values: test_scoring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plop_ext
from plop_ext import InputError, Scores
from tests import tiny_models
from tests.tiny_models import Plain, token_batch


def score(model: nn.Module, data: Any, **settings: Any) -> Scores:
    return plop_ext.score(model, data, progress=False, **settings)


def features(samples: int = 2, tokens: int = 20) -> Tensor:
    return torch.randn(samples, tokens, 16)


@pytest.mark.parametrize("samples", [3, 20])  # 20 labels would broadcast over 20 tokens
def test_labels_that_are_no_tokens_labels(samples: int) -> None:
    batch = {**token_batch([20] * samples), "labels": torch.zeros(samples, dtype=torch.long)}
    with pytest.raises(InputError, match=rf"one entry per token, \[{samples}, 20\], got \[{samples}\]"):
        score(tiny_models.bert(), [batch], mask="completion")


@pytest.mark.parametrize("ids", [[1], [1, 2, 3], [[1], [2]]])
def test_sample_ids_that_are_not_one_per_sample(ids: list[Any]) -> None:
    with pytest.raises(InputError, match=r"`sample_ids` in a batch must be \[2\], one per sample, got \["):
        score(Plain(), [{"x": features(), "sample_ids": torch.tensor(ids)}])
