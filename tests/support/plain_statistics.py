"""The statistics of a table again, in loops over modules, samples and layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from plop_ext.statistics import GainTable
from plop_ext.statistics.resampling import resample_counts, widening


def module_nfn(table: GainTable, module: int, counts: Sequence[float]) -> float:
    """NFN of a module if sample s counts `counts[s]` times; NaN without tokens."""
    gain = sum(count * value for count, value in zip(counts, table.sum_gain[module], strict=True))
    tokens = sum(count * value for count, value in zip(counts, table.tokens[module], strict=True))
    return gain / tokens / table.baseline[module] if tokens else math.nan


def type_nfn(table: GainTable, label: str, counts: Sequence[float], layers: Sequence[int] | None = None) -> float:
    """Mean NFN of the modules of a type that have tokens, each as often as its layer occurs in `layers`."""
    values = [module_nfn(table, module, counts) for module in members(table, label)]
    often = [1 if layers is None else list(layers).count(table.layer[module]) for module in members(table, label)]
    known = [(value, times) for value, times in zip(values, often, strict=True) if not math.isnan(value)]
    total = sum(times for _, times in known)
    return sum(value * times for value, times in known) / total if total else math.nan


def members(table: GainTable, label: str) -> list[int]:
    """The modules of a type."""
    return [module for module, place in enumerate(table.type_index) if table.types[place] == label]


def layers_of(table: GainTable, label: str) -> list[int]:
    """The layers that hold a module of a type, ascending."""
    return sorted({int(table.layer[module]) for module in members(table, label)})


def all_of(table: GainTable) -> list[float]:
    """The counts of the samples of the data itself."""
    return [1.0] * table.samples


def widened(value: float, point: float, n: int) -> float:
    """A resample of n units, as far from the estimate as in a t interval of logs; the estimate itself if it is NaN."""
    return (
        point if math.isnan(value) else math.exp(math.log(point) + widening(n) * (math.log(value) - math.log(point)))
    )


def types_over_samples(table: GainTable, resamples: int, seed: int) -> np.ndarray:
    """[R, T]"""
    return np.array(
        [
            [
                widened(type_nfn(table, label, counts), type_nfn(table, label, all_of(table)), table.samples)
                for label in table.types
            ]
            for counts in resample_counts(table.samples, resamples, seed)
        ]
    )


def modules_over_samples(table: GainTable, resamples: int, seed: int) -> np.ndarray:
    """[R, M]"""
    return np.array(
        [
            [
                widened(module_nfn(table, module, counts), module_nfn(table, module, all_of(table)), table.samples)
                for module in range(len(table.baseline))
            ]
            for counts in resample_counts(table.samples, resamples, seed)
        ]
    )


def types_over_layers(table: GainTable, resamples: int, seed: int) -> np.ndarray:
    """[R, T]; each set of layers has its own seed, the sets as sorted by which of the layers they hold."""
    everywhere = sorted({int(layer) for layer in table.layer})
    held = {label: tuple(layer in layers_of(table, label) for layer in everywhere) for label in table.types}
    columns = []
    for label in table.types:
        layers = layers_of(table, label)
        point = type_nfn(table, label, all_of(table))
        if len(layers) == 1:
            columns.append([point] * resamples)
            continue
        drawn = resample_counts(len(layers), resamples, seed + 1 + sorted(set(held.values())).index(held[label]))
        chosen = [np.repeat(layers, row.astype(int)).tolist() for row in drawn]
        columns.append([widened(type_nfn(table, label, all_of(table), those), point, len(layers)) for those in chosen])
    return np.array(columns).T


def without_each_layer(table: GainTable) -> np.ndarray:
    """[L, T]"""
    everywhere = sorted({int(layer) for layer in table.layer})
    rows = []
    for layer in everywhere:
        row = []
        for label in table.types:
            others = [other for other in everywhere if other != layer]
            value = type_nfn(table, label, all_of(table), others)
            row.append(type_nfn(table, label, all_of(table)) if math.isnan(value) else value)
        rows.append(row)
    return np.array(rows)


def shares_of_same_lowest(values: np.ndarray) -> list[float]:
    """For k = 1 .. n - 1: how often the k lowest of a row are the first k, with nothing outside as low."""
    n = values.shape[1]
    return [sum(max(row[:k]) < min(row[k:]) for row in values.tolist()) / len(values) for k in range(1, n)]
