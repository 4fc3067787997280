"""E||W u|| from squared singular values: closed forms, draws and the oracle's own integral."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from plop_ext import reference
from plop_ext.scoring.mean_gain import mean_chi, mean_gain, mean_norm


def test_the_norm_of_a_normal_vector_has_the_mean_of_a_chi() -> None:
    # E|N(0, 1)|, the means of the Rayleigh and of the Maxwell distribution.
    known = [math.sqrt(2 / math.pi), math.sqrt(math.pi / 2), 2 * math.sqrt(2 / math.pi)]
    assert [mean_chi(degrees) for degrees in (1, 2, 3)] == pytest.approx(known, rel=1e-14)
    for degrees in (1, 2, 3, 16, 128):
        assert mean_norm(np.full((1, degrees), 9.0))[0] == pytest.approx(3 * mean_chi(degrees), rel=1e-12)
    assert mean_chi(10**6) == pytest.approx(math.sqrt(10**6 - 0.5), rel=1e-9)


def test_two_eigenvalues_give_an_elliptic_integral() -> None:
    # In polar coordinates, E sqrt(a x^2 + b y^2) is E r times the mean of sqrt(a cos^2 + b sin^2) over the circle.
    angles = (np.arange(2000) + 0.5) * math.pi / 1000
    for a, b in ((1.0, 2.0), (1.0, 50.0), (3.0, 1e-3)):
        circle = np.sqrt(a * np.cos(angles) ** 2 + b * np.sin(angles) ** 2).mean()
        assert mean_norm(np.array([[a, b]]))[0] == pytest.approx(math.sqrt(math.pi / 2) * circle, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_spectra_over_many_decades_equal_the_oracle(scale: float) -> None:
    rng = np.random.default_rng(0)
    spectra = np.exp(rng.normal(0.0, 2.0, (6, 40)))
    spectra[3:, 5:] *= 1e-8
    expected = [reference.mean_gain(torch.diag(torch.tensor(row).sqrt() * scale), nodes=40_000) for row in spectra]
    assert mean_gain(spectra * scale**2, 40).tolist() == pytest.approx(expected, rel=1e-8)


def test_each_row_is_computed_by_itself_and_zeros_do_not_matter() -> None:
    spectra = np.random.default_rng(1).uniform(0.1, 2.0, (5, 7))
    together = mean_norm(spectra)
    assert together.tolist() == [mean_norm(row[None])[0] for row in spectra]
    padded = np.concatenate([spectra, np.zeros((5, 3)), np.full((5, 1), -1e-18)], axis=1)
    assert mean_norm(padded).tolist() == pytest.approx(together.tolist(), rel=1e-14)
    assert mean_norm(np.zeros((2, 3))).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("rows", "columns"), [(1, 6), (3, 12), (40, 5), (20, 20)])
def test_draws_on_the_sphere_have_this_mean(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, dtype=torch.float64)
    u = torch.randn(200_000, columns, dtype=torch.float64)
    gains = (u / u.norm(dim=1, keepdim=True) @ weight.T).norm(dim=1)
    (expected,) = mean_gain(torch.linalg.svdvals(weight).square().numpy()[None], columns)
    # Five standard errors.
    assert float(gains.mean()) == pytest.approx(expected, abs=5 * float(gains.std()) / math.sqrt(len(gains)))
    assert reference.mean_gain(weight) == pytest.approx(expected, rel=1e-7)
