"""The gain of a module on random inputs, which is the denominator of NFN."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext import ops
from plop_ext.layers import LinearLayer, Unsupported, weights_in_place
from plop_ext.layers.experts import ExpertsAdapter
from plop_ext.layers.gram import is_narrow
from plop_ext.progress import progress_bar
from plop_ext.score_data.settings import Settings
from plop_ext.scoring.mean_gain import mean_gain

# Of a layer whose weight or forward cannot be used.
_UNKNOWN = torch.tensor(math.nan, dtype=torch.float64)


@dataclass(frozen=True)
class WeightNorms:
    """||W||_F of every layer.

    Attributes:
        values: One per layer; NaN if the weight could not be read.
        failures: Name of each such layer to the reason.
    """

    values: list[float]
    failures: dict[str, str]


def frobenius_norms(layers: Sequence[LinearLayer], advance: Callable[[int], None] = lambda done: None) -> WeightNorms:
    """Return ||W||_F of each layer: one read of every weight, quantized ones in chunks, and one wait for the device.

    Args:
        layers: The layers.
        advance: Called with the number of layers that were completed.
    """
    totals: list[Tensor] = []
    failures: dict[str, str] = {}
    for module, parts in _by_module(layers):
        first = parts[0]
        advance(len(parts))
        try:
            with nullcontext() if first.adapter.sums_shards(module) else weights_in_place(module):
                sums = first.adapter.part_sumsq(module, first.split)
        except Unsupported as error:
            failures.update((part.name, str(error)) for part in parts)
        except Exception as error:  # a third-party kernel that refuses this input, type or device
            if first.adapter.weights == "weight":
                raise
            text = f"its weight cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})"
            failures.update((part.name, text) for part in parts)
        else:
            totals += [sums[part.part] for part in parts]
            continue
        totals += [_UNKNOWN] * len(parts)
    return WeightNorms([math.sqrt(total) for total in _to_host(totals)], failures)


def compute_baselines(
    layers: Sequence[LinearLayer], norms: WeightNorms, settings: Settings, progress: bool = False
) -> list[float]:
    """Return the baseline of each layer, of the kind that `settings` ask for; `progress` shows a bar of probes."""
    if settings.baseline == "frobenius":
        return frobenius_baselines(layers, norms.values)
    # The published script draws as many probes as it reads tokens.
    known = None if settings.compat is None else norms.values
    with progress_bar("probing", len(layers), progress) as advance:
        return probe_baselines(layers, probes=settings.probes, seed=settings.seed, norms=known, advance=advance)


def frobenius_baselines(layers: Sequence[LinearLayer], norms: Sequence[float]) -> list[float]:
    r"""Return \(b = \lVert W \rVert_F / \sqrt{K}\), the root mean square of ||W u|| over the unit sphere.

    By Jensen's inequality, it is at least E||W u||. In a narrow matrix, with min(M, K) up to `NARROW`, the difference
    may exceed 0.2 % and is 20 % at M = 1: its baseline is E||W u|| itself, from the eigenvalues of its Gram matrix.
    """
    baselines = [norm / math.sqrt(layer.in_features) for layer, norm in zip(layers, norms, strict=True)]
    narrow = [is_narrow(layer.in_features, layer.out_features) for layer in layers]
    start = 0
    for module, parts in _by_module(layers):
        places = range(start, start + len(parts))
        start += len(parts)
        wanted = [i for i in places if narrow[i] and math.isfinite(norms[i])]
        if not wanted:
            continue
        with weights_in_place(module):
            grams = parts[0].adapter.part_grams(module, parts[0].split)
        for i, gain in zip(wanted, _mean_gains([layers[i] for i in wanted], grams), strict=True):
            baselines[i] = gain
    return baselines


def _mean_gains(layers: Sequence[LinearLayer], grams: Sequence[Tensor | None]) -> list[float]:
    """Return E||W u|| of narrow parts of one module.

    Args:
        layers: The parts.
        grams: The Gram matrices of all parts of the module, by position.
    """
    gains: list[float] = []
    # Parts of one shape together: a layer has up to hundreds of experts.
    for features, same in groupby(layers, key=lambda layer: (layer.in_features, layer.out_features)):
        stacked = torch.stack([gram for layer in same if (gram := grams[layer.part]) is not None]).cpu()
        eigenvalues = torch.linalg.eigvalsh(stacked).flatten(1).numpy()
        gains += mean_gain(eigenvalues, features[0]).tolist()
    return gains


def probe_baselines(
    layers: Sequence[LinearLayer],
    *,
    probes: int,
    seed: int,
    norms: Sequence[float] | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[float]:
    r"""Estimate \(b = E_u \lVert W u \rVert\), u uniform on the unit sphere, by Monte Carlo: the paper's definition.

    Pushes `probes` random inputs through the module's own forward, so it needs no readable weight. Each module draws
    from a generator seeded by `seed` and its name: a module's baseline does not depend on which others are scored. The
    global random state is not touched. The standard error is at most 1 / sqrt(2 * rank(W) * probes) of b for a
    well-conditioned W. NaN where a foreign kernel refuses such inputs.

    With `norms`, the known mean of ||W u||^2, which is ||W||_F^2 / K, serves as a control variate, because most of the
    error of a mean of ||W u|| is that of the mean of its square. 256 probes are then as good as 100 times as many.

    Args:
        layers: Layers to probe, without hooks.
        probes: Number of random inputs per module; 256 is enough for three digits.
        seed: Seed of the inputs.
        norms: ||W||_F of the layers, NaN where unknown; None uses the probes alone, as a check on the norms.
        advance: Called with the number of layers that were completed.
    """
    totals = []
    with torch.no_grad():
        for module, parts in _by_module(layers):
            advance(len(parts))
            try:
                with weights_in_place(module):
                    totals += _probe_module(module, parts, probes, seed)
            except Exception:
                if parts[0].adapter.weights == "weight":
                    raise
                totals += [_UNKNOWN.expand(2)] * len(parts)
    means, squares = zip(*_to_host(totals), strict=True)
    if norms is None:
        return list(means)
    return [
        _controlled(mean, square, norm**2 / layer.in_features)
        for mean, square, norm, layer in zip(means, squares, norms, layers, strict=True)
    ]


def _controlled(mean: float, square: float, expected: float) -> float:
    """Correct a mean gain by the error of the mean squared gain, whose expectation is known."""
    return mean - (square - expected) / (2 * math.sqrt(expected)) if expected > 0 else mean


def _probe_module(module: nn.Module, parts: Sequence[LinearLayer], probes: int, seed: int) -> list[Tensor]:
    """Return [2] float64 for each part of one module: the means of the gains and of their squares."""
    adapter, split = parts[0].adapter, parts[0].split
    device = next(tensor.device for tensor in (*module.parameters(), *module.buffers()))
    dtype = adapter.dtype(module)

    def draw(name: str, features: int) -> Tensor:
        # Directions with the norm sqrt(K) of a normalized activation. The ratio does not depend on the norm, but the
        # rounding of a low-precision output that includes a bias does.
        draws = torch.randn(probes, features, generator=_generator(seed, name))
        return (draws / draws.square().mean(dim=1, keepdim=True).sqrt()).to(device, dtype)

    if isinstance(adapter, ExpertsAdapter):
        gains = []
        for part in parts:
            z = draw(part.name, part.in_features)
            gains.append(_gain_moments(z, adapter.probe_part(module, part.part, z).contiguous(), None))
        return gains
    name = parts[0].name if split is None else parts[0].name.rpartition(".")[0]
    z = draw(name, parts[0].in_features)
    bias = adapter.bias(module)  # before the forward, after which accelerate removes an offloaded bias
    y = adapter.probe(module, z)
    if split is None:
        return [_gain_moments(z, y, bias)]
    return [
        _gain_moments(
            z,
            split.select(y, part.part).flatten(1),
            None if bias is None else split.select(bias, part.part).flatten().contiguous(),
        )
        for part in parts
    ]


def _gain_moments(z: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    s_in, s_out = (v.new_empty(len(v), dtype=ops.sum_dtype(v.dtype)) for v in (z, y))
    ops.row_sumsq_(s_in, z)
    ops.row_sumsq_(s_out, y, None if bias is None else bias.to(s_out.dtype))
    squares = s_out.double() / s_in.double()
    return torch.stack((squares.sqrt().mean(), squares.mean()))


def _by_module(layers: Sequence[LinearLayer]) -> Iterator[tuple[nn.Module, list[LinearLayer]]]:
    """Yield the modules with their parts, which are neighbours."""
    for _, parts in groupby(layers, key=lambda layer: id(layer.module)):
        members = list(parts)
        yield members[0].module, members


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _to_host(totals: list[Tensor]) -> list[Any]:
    """Return all values with one transfer per device."""
    values = {
        device: iter(torch.stack([total for total in totals if total.device == device]).tolist())
        for device in {total.device for total in totals}
    }
    return [next(values[total.device]) for total in totals]
