"""What a module's gain would be on random inputs: the denominator of NFN."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from plop_ext import ops
from plop_ext.layers import LinearLayer

BASELINES = ("frobenius", "probe")


def frobenius_norms(layers: Sequence[LinearLayer]) -> list[float]:
    """||W||_F of each layer: one read of the weight, no copy of it, one wait for the device at the end."""
    totals = []
    for layer in layers:
        weight = layer.adapter.weight_rows(layer.module).detach()
        sums = _sums_like(weight, weight.shape[0])
        ops.row_sumsq_(sums, weight)
        totals.append(sums.sum(dtype=torch.float64))
    return [math.sqrt(total) for total in _to_host(totals)]


def frobenius_baselines(layers: Sequence[LinearLayer], norms: Sequence[float]) -> list[float]:
    r"""\(b = \lVert W \rVert_F / \sqrt{K}\), the root mean square of ||W u|| over the unit sphere; E||W u|| <= b."""
    return [norm / math.sqrt(layer.in_features) for layer, norm in zip(layers, norms, strict=True)]


def probe_baselines(layers: Sequence[LinearLayer], *, probes: int, seed: int) -> list[float]:
    r"""Monte-Carlo estimate of \(b = E_u \lVert W u \rVert\), u uniform on the unit sphere: the paper's definition.

    Pushes `probes` random inputs through the module's own forward, so it needs no readable weight. Each module draws
    from a generator seeded by `seed` and its name: a module's baseline does not depend on which others are scored. The
    global random state is not touched. The standard error is at most 1 / sqrt(2 * rank(W) * probes) of b for a
    well-conditioned W.

    Args:
        layers: What to probe, hooks not attached.
        probes: Number of random inputs per module; 256 is enough for three digits.
        seed: Changes every draw.
    """
    totals = []
    with torch.no_grad():
        for layer in layers:
            # Directions with the norm sqrt(K) of a normalised activation: the ratio below does not depend on the norm,
            # the rounding of a low-precision output with a bias in it does.
            draws = torch.randn(probes, layer.in_features, generator=_generator(seed, layer.name))
            weight = layer.adapter.weight_rows(layer.module)
            dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
            inputs = (draws / draws.square().mean(dim=1, keepdim=True).sqrt()).to(weight.device, dtype)
            outputs = layer.module.forward(inputs)
            bias = layer.adapter.bias(layer.module)
            s_in, s_out = _sums_like(inputs, probes), _sums_like(outputs, probes)
            ops.row_sumsq_(s_in, inputs)
            ops.row_sumsq_(
                s_out, outputs, bias if bias is None or bias.dtype == outputs.dtype else bias.to(s_out.dtype)
            )
            totals.append((s_out.double() / s_in.double()).sqrt().mean())
    return _to_host(totals)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _sums_like(values: Tensor, rows: int) -> Tensor:
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return torch.empty(rows, dtype=dtype, device=values.device)


def _to_host(totals: list[Tensor]) -> list[float]:
    """All values with one transfer per device."""
    values = [0.0] * len(totals)
    for device in {total.device for total in totals}:
        places = [place for place, total in enumerate(totals) if total.device == device]
        for place, value in zip(places, torch.stack([totals[place] for place in places]).tolist(), strict=True):
            values[place] = value
    return values
