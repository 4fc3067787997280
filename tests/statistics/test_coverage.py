"""Does the 95 % interval hold the truth 95 % of the time? Simulated with tokens that are correlated, and sampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plop_ext.collecting.collector import Collector
from plop_ext.layers import discover
from plop_ext.statistics import GainTable, resampling
from plop_ext.totals import Totals
from tests.support.tiny_models import Plain

RUNS = 1500
MEAN, BETWEEN, WITHIN, CORRELATION = 1.2, 0.1, 0.3, 0.9


def token_gains(rng: np.random.Generator, samples: int, tokens: int) -> np.ndarray:
    """[samples, tokens]: a level per sample, a trend over positions, and noise correlated from token to token."""
    noise = np.empty((samples, tokens))
    noise[:, 0] = rng.standard_normal(samples)
    innovation = rng.standard_normal((samples, tokens)) * (1 - CORRELATION**2) ** 0.5
    for t in range(1, tokens):
        noise[:, t] = CORRELATION * noise[:, t - 1] + innovation[:, t]
    trend = 0.2 * (0.5 - np.arange(tokens) / (tokens - 1))
    return MEAN + BETWEEN * rng.standard_normal((samples, 1)) + trend + WITHIN * noise


def experiment(samples: int, step: int, unit: str = "sample") -> tuple[float, float]:
    """Coverage of the interval and its mean width over many data sets."""
    rng = np.random.default_rng(1)
    tokens = 64
    covered, widths = 0, []
    for run in range(RUNS):
        gains = token_gains(rng, samples, tokens)
        lengths = rng.integers(tokens // 2, tokens + 1, size=samples)
        # What the truth is for sequences of these lengths: the trend's mean over the tokens that count.
        counted = np.arange(tokens) < lengths[:, None]
        truth = MEAN + float((0.2 * (0.5 - np.arange(tokens) / (tokens - 1)) * counted).sum() / counted.sum())
        phase = rng.integers(step)
        read = counted & ((np.arange(tokens) - phase) % step == 0)
        sums, counts = (gains * read).sum(axis=1), read.sum(axis=1).astype(float)
        if unit == "token":
            sums, counts = gains[read], np.ones(int(read.sum()))
        source = GainTable.make(sums[None], counts[None], np.ones(1), np.ones(1), ["a"], [0])
        low, high = resampling.interval(resampling.types_over_samples(source, resamples=400, seed=run))[:, 0]
        covered += low <= truth <= high
        widths.append(high - low)
    return covered / RUNS, float(np.mean(widths))


@pytest.mark.parametrize("samples", [4, 8, 16, 64])
def test_coverage_is_nominal_from_4_samples_on(samples: int) -> None:
    coverage, _ = experiment(samples, step=1)
    assert 0.93 <= coverage <= 0.97


def test_coverage_holds_for_sampled_tokens_and_the_interval_widens() -> None:
    _, every = experiment(16, step=1)
    coverage, eighth = experiment(16, step=8)
    assert 0.93 <= coverage <= 0.97
    assert 1.01 < eighth / every < 1.5


@pytest.mark.slow
def test_tokens_as_units_would_be_far_too_sure() -> None:
    coverage, _ = experiment(16, step=1, unit="token")
    assert coverage < 0.7


def totals_at(step: int, phase: int, mask: torch.Tensor, x: torch.Tensor, device: torch.device) -> torch.Tensor:
    model = Plain().to(device)
    with torch.no_grad(), Collector(model, discover(model).layers) as collector:
        collector.begin(len(x), mask, step=step, phase=phase)
        model(x.to(device))
        collector.end()
    return collector.recording.queue.all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_token_is_read_in_exactly_one_phase(device: torch.device, side: str) -> None:
    """So with a uniform phase each counts with probability 1 / step: sums and token counts are unbiased."""
    step = 4
    x = torch.randn(3, 13, 16)
    mask = torch.arange(13) < torch.tensor([[13], [5], [9]])
    mask = mask if side == "right" else mask.flip(1)
    torch.manual_seed(0)
    full = totals_at(1, 0, mask, x, device)
    parts = []
    for phase in range(step):
        torch.manual_seed(0)
        parts.append(totals_at(step, phase, mask, x, device))
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), full, rtol=1e-6, atol=1e-6)
    # Spread over the whole sequence: no phase misses a sample of at least `step` tokens.
    assert all((Totals(part.numpy()).tokens > 0).all() for part in parts)


def test_a_prefix_is_biased_where_positions_differ() -> None:
    rng = np.random.default_rng(2)
    gains = token_gains(rng, 4000, 64)
    full = gains.mean()
    error = gains.mean(axis=1).std() / 4000**0.5
    spread = np.mean([gains[:, phase::8].mean() for phase in range(8)])
    assert spread == pytest.approx(full, rel=1e-12)
    assert abs(gains[:, :8].mean() - full) > 10 * error


def test_the_phase_is_seeded() -> None:
    from plop_ext.scoring.score import score

    torch.manual_seed(0)
    model = Plain()
    data = [torch.randn(4, 23, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def run(seed: int) -> np.ndarray:
        return score(model, data, max_samples=None, token_step=7, seed=seed, progress=False).totals.values

    assert (run(1) == run(1)).all()
    assert any((run(1) != run(seed)).any() for seed in (2, 3))
