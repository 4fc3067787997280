r"""The mean gain of a matrix on random directions, E||W u||, from its squared singular values.

For g normal in R^K, g / ||g|| is uniform on the sphere and independent of ||g||. So E||W u|| = E||W g|| / E||g||, and
||W g||^2 is distributed as \(Q = \sum_i \lambda_i g_i^2\), where \(\lambda_i\) are the eigenvalues of W W^T.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Nodes of the quadrature; `mean_norm` states its accuracy. At the first and the last node, |log t| is 70, and the
# integrand is e^-35.
_NODES = 81
_RANGE = math.asinh(35.0)


def mean_gain(eigenvalues: Floats, in_features: int) -> Floats:
    """Return E||W u||, u uniform on the unit sphere of R^K.

    Args:
        eigenvalues: [B, n] eigenvalues of W W^T, without zeros if you like; rounding may make some negative.
        in_features: K.

    Returns:
        [B] float64.
    """
    return mean_norm(eigenvalues) / mean_chi(in_features)


def mean_norm(eigenvalues: Floats) -> Floats:
    r"""Return E||W g||, g normal in R^K, to a relative error below 1e-9.

    \(E \sqrt{Q} = \frac{1}{2 \sqrt{\pi}} \int_0^\infty t^{-3/2} (1 - E e^{-t Q}) dt\) with
    \(E e^{-t Q} = \prod_i (1 + 2 \lambda_i t)^{-1/2}\). With t = exp(2 sinh s), the integrand is analytic on the
    line and vanishes doubly exponentially, so that the trapezoidal rule converges exponentially.

    Args:
        eigenvalues: As for `mean_gain`.

    Returns:
        [B] float64.
    """
    clipped = np.maximum(eigenvalues, 0.0)
    total = clipped.sum(axis=1)
    # At total 1, the integrand lies around t = 1 for any spectrum.
    spectrum = clipped / np.where(total > 0, total, 1.0)[:, None]
    nodes, step = np.linspace(-_RANGE, _RANGE, _NODES, retstep=True)
    log_t = 2.0 * np.sinh(nodes)
    transform = -0.5 * np.log1p(2.0 * spectrum[:, :, None] * np.exp(log_t)).sum(axis=1)
    weights = np.exp(-0.5 * log_t) * 2.0 * np.cosh(nodes) * step
    # Not a matrix product, whose rounding depends on B.
    integral = (-np.expm1(transform) * weights).sum(axis=1)
    return np.sqrt(total) * integral / (2.0 * math.sqrt(math.pi))


def mean_chi(degrees: int) -> float:
    """Return E||g||, g normal in R^degrees."""
    return math.sqrt(2.0) * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
