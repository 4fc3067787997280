"""Baselines: exact Frobenius norms, and probes that estimate the expectation below them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import plop_ext
from plop_ext import reference
from plop_ext.layers import discover
from plop_ext.scoring.baseline import frobenius_baselines, frobenius_norms, probe_baselines
from tests.support import tiny_models
from tests.support.tiny_models import Plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_frobenius_equals_the_oracle(dtype: torch.dtype, device: torch.device) -> None:
    model = tiny_models.llama().to(device, dtype)
    found = discover(model).layers
    norms = frobenius_norms(found).values
    values = frobenius_baselines(found, norms)
    for layer, norm, value in zip(found, norms, values, strict=True):
        assert value == pytest.approx(reference.frobenius_baseline(layer.module.weight), rel=1e-6)
        assert norm == pytest.approx(float(layer.module.weight.detach().double().norm()), rel=1e-6)


def test_frobenius_of_a_transposed_and_of_a_sliced_weight() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5))
    model[0].weight = nn.Parameter(torch.randn(6, 9).T)
    model[1].weight = nn.Parameter(torch.randn(5, 18)[:, ::2])
    found = discover(model).layers
    expected = [float(layer.module.weight.detach().double().norm()) for layer in found]
    assert frobenius_norms(found).values == pytest.approx(expected, rel=1e-6)


def expectation(weight: torch.Tensor, draws: int = 200_000) -> tuple[float, float]:
    """E ||W u|| and its standard error, in float64, by draws of its own."""
    u = torch.randn(draws, weight.shape[1], dtype=torch.float64)
    gains = (u / u.norm(dim=1, keepdim=True) @ weight.detach().double().T).norm(dim=1)
    return float(gains.mean()), float(gains.std()) / math.sqrt(draws)


def test_probes_converge_to_the_expectation_which_is_the_baseline_of_narrow_layers() -> None:
    model = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 3))
    found = discover(model).layers
    exact = frobenius_baselines(found, frobenius_norms(found).values)
    estimated = probe_baselines(found, probes=200_000, seed=0)
    for layer, baseline, value in zip(found, exact, estimated, strict=True):
        expected, error = expectation(layer.module.weight)
        assert baseline < float(layer.module.weight.detach().norm()) / math.sqrt(layer.in_features)
        assert abs(baseline - expected) < 5 * error
        assert abs(value - expected) < 5 * math.sqrt(2) * error
    coarse = [abs(probe_baselines(found, probes=16, seed=seed)[0] / estimated[0] - 1) for seed in range(20)]
    fine = [abs(probe_baselines(found, probes=4096, seed=seed)[0] / estimated[0] - 1) for seed in range(20)]
    assert np.mean(fine) < np.mean(coarse) / 8  # 16 times fewer errors are expected


def test_probes_are_seeded_and_independent_of_the_other_modules() -> None:
    model = Plain()
    found = discover(model).layers
    state = torch.get_rng_state()
    values = probe_baselines(found, probes=8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert probe_baselines(found, probes=8, seed=3) == values
    assert probe_baselines(found[1:2], probes=8, seed=3) == values[1:2]
    assert probe_baselines(found[::-1], probes=8, seed=3) == values[::-1]
    other = probe_baselines(found, probes=8, seed=4)
    assert all(abs(a - b) > 1e-6 for a, b in zip(values, other, strict=True))
    with torch.no_grad():
        model.layers[1].up.weight.copy_(model.layers[0].up.weight)
    twins = [layer for layer in found if layer.type == "up"]
    first, second = probe_baselines(twins, probes=8, seed=3)
    assert first != second  # draws of their own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probes_leave_the_bias_out(dtype: torch.dtype, device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(32, 24)).to(device)
    nn.init.normal_(model[0].bias, std=3.0)
    (expected,) = probe_baselines(discover(model).layers, probes=64, seed=0)
    with_bias = expected
    nn.init.zeros_(model[0].bias)
    (without,) = probe_baselines(discover(model).layers, probes=64, seed=0)
    assert with_bias == pytest.approx(without, rel=1e-5)
    (half,) = probe_baselines(discover(model.to(dtype)).layers, probes=64, seed=0)
    assert half == pytest.approx(without, rel=1e-5 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("settings", [{"baseline": "frobenius"}, {"baseline": "probe", "probes": 512}], ids=str)
def test_scores_use_the_baseline_asked_for(settings: dict[str, Any]) -> None:
    model = Plain()
    scores = plop_ext.score(model, [torch.randn(2, 20, 16)], progress=False, **settings)
    found = discover(model).layers
    norms = frobenius_norms(found).values
    if settings["baseline"] == "probe":
        expected = probe_baselines(found, probes=512, seed=0)
        assert scores.provenance["settings"]["probes"] == 512
    else:
        expected = frobenius_baselines(found, norms)
    assert scores.baseline.tolist() == expected
    assert [module.weight_norm for module in scores.modules] == norms
