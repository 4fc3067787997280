"""The oracle: NFN and the fused ops by their definitions, naive and in float64, independent of the code under test.

`nfn` keeps every activation and computes W z again, so it is for tests and small models only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def token_gains(weight: Tensor, inputs: Tensor) -> Tensor:
    """Return the gain ||W z|| / ||z|| of each row of `inputs`.

    Args:
        weight: [M, K], any float dtype.
        inputs: [..., K].

    Returns:
        [...] float64; NaN where the input is zero.
    """
    z = inputs.detach().to("cpu", torch.float64)
    w = weight.detach().to("cpu", torch.float64)
    return torch.linalg.vector_norm(z @ w.T, dim=-1) / torch.linalg.vector_norm(z, dim=-1)


def frobenius_baseline(weight: Tensor) -> float:
    """Return ||W||_F / sqrt(K), or `mean_gain` if min(M, K) is at most 128."""
    w = weight.detach().to("cpu", torch.float64)
    if min(w.shape) <= 128:
        return mean_gain(w)
    return float(w.square().sum().sqrt() / w.shape[1] ** 0.5)


def mean_gain(weight: Tensor, nodes: int = 4000) -> float:
    r"""Return E||W u||, u uniform on the unit sphere, as \(E\lVert W g \rVert / E\lVert g \rVert\) for normal g.

    With the singular values \(\sigma_i\) of W,
    \(E\lVert W g \rVert = \frac{2}{\sqrt{\pi}} \int_0^\infty \prod_i (1 + 2 \sigma_i^2 s^2)^{-1/2}
    \sum_i \frac{\sigma_i^2}{1 + 2 \sigma_i^2 s^2} ds\), by the midpoint rule in the angle whose tangent is s times
    ||W||_F.

    Args:
        weight: [M, K], any float dtype.
        nodes: Nodes of the rule; the error falls with their square.
    """
    w = weight.detach().to("cpu", torch.float64)
    scale = torch.linalg.vector_norm(w)
    squares = torch.linalg.svdvals(w / scale).square()[:, None]
    angle = (torch.arange(nodes, dtype=torch.float64) + 0.5) * (math.pi / 2 / nodes)
    grown = 1 + 2 * squares * angle.tan().square()
    integrand = grown.prod(dim=0) ** -0.5 * (squares / grown).sum(dim=0) / angle.cos().square()
    expected = 2 / math.sqrt(math.pi) * float(integrand.sum()) * (math.pi / 2 / nodes) * float(scale)
    columns = w.shape[1]
    return expected / (math.sqrt(2) * math.exp(math.lgamma((columns + 1) / 2) - math.lgamma(columns / 2)))


def nfn(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], module_names: Iterable[str], count_padding: bool = False
) -> dict[str, float]:
    """Return NFN, the mean gain over the baseline, of each named `nn.Linear` over all counted tokens of `batches`.

    Args:
        model: Any model; called as `model(**batch)` in evaluation mode without gradients.
        batches: Dicts of tensors; `attention_mask` [B, T], if present, marks the tokens that count.
        module_names: Full names of the `nn.Linear` modules to score.
        count_padding: Count every token, as the published script does.

    Returns:
        Module name to NFN.
    """
    modules = dict(model.named_modules())
    names = list(module_names)
    gains: dict[str, list[Tensor]] = {name: [] for name in names}
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            seen: dict[str, list[Tensor]] = {name: [] for name in names}
            handles = [
                modules[name].register_forward_hook(
                    lambda module, args, output, gains=seen[name]: gains.append(
                        token_gains(module.weight, args[0]).reshape(-1)
                    )
                )
                for name in names
            ]
            try:
                with torch.no_grad():
                    model(**batch)
            finally:
                for handle in handles:
                    handle.remove()
            mask = batch.get("attention_mask")
            for name in names:
                for values in seen[name]:
                    keep = torch.isfinite(values)
                    if mask is not None and not count_padding and values.numel() == mask.numel():
                        keep &= mask.reshape(-1).bool().cpu()
                    gains[name].append(values[keep])
    finally:
        model.train(was_training)
    return {
        name: float(torch.cat(values).mean()) / frobenius_baseline(modules[name].weight)
        for name, values in gains.items()
    }


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """Compute RMSNorm over the last axis, unrounded.

    Args:
        x: [..., K], any float dtype.
        weight: [K].
        eps: Added to the mean square.
        unit_offset: `weight` is stored as its distance from 1.

    Returns:
        [..., K] float64.
    """
    z, w = x.detach().to("cpu", torch.float64), weight.detach().to("cpu", torch.float64)
    mean_square = (z * z).sum(dim=-1, keepdim=True) / z.shape[-1]
    return z / (mean_square + eps).sqrt() * (w + 1 if unit_offset else w)


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute a(gate) * up, unrounded.

    Args:
        gate: Any shape, any float dtype.
        up: The same shape, any float dtype.
        activation: `"silu"`, g / (1 + e^-g), or `"gelu_tanh"`, the tanh form of GELU.

    Returns:
        float64 of that shape.
    """
    g, u = gate.detach().to("cpu", torch.float64), up.detach().to("cpu", torch.float64)
    if activation == "silu":
        return g / (1 + (-g).exp()) * u
    return g / 2 * (1 + (math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)).tanh()) * u


def gated_projection(x: Tensor, gate_weight: Tensor, up_weight: Tensor, activation: str) -> Tensor:
    """Compute a(x gate_weight^T) * (x up_weight^T), unrounded.

    Args:
        x: [R, K], any float dtype.
        gate_weight: [I, K], any float dtype.
        up_weight: [I, K], any float dtype.
        activation: As for `gated_activation`.

    Returns:
        [R, I] float64.
    """
    z, g, u = (tensor.detach().to("cpu", torch.float64) for tensor in (x, gate_weight, up_weight))
    return gated_activation(z @ g.T, z @ u.T, activation)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to heads, unrounded: feature d of the first R is rotated with feature d + R / 2.

    Args:
        x: [B, T, H, D], any float dtype.
        cos: [B or 1, T, R].
        sin: Like `cos`.

    Returns:
        [B, T, H, D] float64.
    """
    z = x.detach().to("cpu", torch.float64)
    c, s = (table.detach().to("cpu", torch.float64).expand(len(z), -1, -1) for table in (cos, sin))
    turned, half = z.clone(), c.shape[-1] // 2
    for d in range(half):
        first, second = z[..., d], z[..., half + d]
        turned[..., d] = first * c[..., None, d] - second * s[..., None, d]
        turned[..., half + d] = second * c[..., None, half + d] + first * s[..., None, half + d]
    return turned
