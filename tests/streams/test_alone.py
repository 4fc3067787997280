"""A sample in a batch has the numbers of the sample alone and unpadded, whatever streams of rows a model has."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from plop_ext import score
from tests.support.stream_cases import CASES, StreamCase
from tests.support.stream_texts import Batch


def gains_alone(model: nn.Module, batch: Batch, names: list[str], case: StreamCase) -> dict[str, list[float]]:
    """Name to the gains ||W z|| / ||z|| of the rows of all calls, in float64, by plain hooks."""
    found: dict[str, list[float]] = {name: [] for name in names}
    modules = dict(model.named_modules())

    def observe(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        z = (args[0] if args else kwargs["input"]).detach().double().flatten(0, -2)
        kept = (z.norm(dim=1) > 0) & case.counted(batch, len(z))
        found[name] += ((z @ module.weight.detach().double().T).norm(dim=1) / z.norm(dim=1))[kept].tolist()

    handles = [
        modules[name].register_forward_pre_hook(
            lambda module, args, kwargs, name=name: observe(name, module, args, kwargs), with_kwargs=True
        )
        for name in names
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_sample_in_a_batch_has_the_numbers_of_the_sample_alone(name: str) -> None:
    case = CASES[name]
    model = case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = score(model, [case.batch()], stop=None, progress=False, **case.kwargs)
    assert not [item for item in scores.unscored if "rows" in item.reason]
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    linear = {key for key, module in root.named_modules() if isinstance(module, nn.Linear)}
    rows = [index for index, entry in enumerate(scores.modules) if entry.name in linear]
    assert rows
    prefix = "base_model." if root is not model else ""
    for sample, alone in enumerate(case.alone()):
        expected = gains_alone(model, alone, [prefix + scores.modules[index].name for index in rows], case)
        for index in rows:
            entry, values = scores.modules[index].name, expected[prefix + scores.modules[index].name]
            assert scores.totals.tokens[index, sample] == len(values), (entry, sample)
            np.testing.assert_allclose(
                scores.totals.sum_gain[index, sample], sum(values), rtol=1e-5, err_msg=f"{entry}, sample {sample}"
            )
