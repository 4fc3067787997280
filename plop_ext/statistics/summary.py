"""All statistics of a ranking of types, for tables, files and figures alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from plop_ext.statistics.boundaries import DEFAULT_TYPES, AutoK, auto_k
from plop_ext.statistics.resampling import (
    CONFIDENCE,
    RESAMPLES,
    interval,
    modules_over_samples,
    types_over_layers,
    types_over_samples,
    without_each_layer,
)
from plop_ext.statistics.signal import Signal, find_signal
from plop_ext.statistics.stability import among_lowest, mean_tau, neighbours_hold, set_holds
from plop_ext.statistics.table import Floats, GainTable

Range = tuple[float, float]
TIED = 0.95


@dataclass(frozen=True)
class TypeStatistics:
    """One type.

    Attributes:
        type: Label.
        nfn: Its NFN.
        over_samples: 95 % interval over resamples of the samples; None for a single sample.
        over_layers: 95 % interval over resamples of the layers; None for a type in one layer.
        without_a_layer: Lowest and highest NFN when one layer is left out; None for a type in one layer.
        p_samples: Share of resamples of the samples with the type among the k lowest; None for a single sample.
        p_layers: The same over resamples of the layers.
    """

    type: str
    nfn: float
    over_samples: Range | None
    over_layers: Range | None
    without_a_layer: Range | None
    p_samples: float | None
    p_layers: float


@dataclass(frozen=True)
class Tie:
    """Two neighbours in the ranking whose order is not certain.

    Attributes:
        lower: The type with the lower NFN.
        upper: The next type.
        over_samples: Share of resamples of the samples that keep this order.
        over_layers: Share of resamples of the layers that keep this order.
        crosses_cut: Whether one is among the k lowest and the other is not.
    """

    lower: str
    upper: str
    over_samples: float
    over_layers: float
    crosses_cut: bool


@dataclass(frozen=True, eq=False)
class Statistics:
    """How certain a ranking is.

    Attributes:
        k: The cut that probabilities and ties refer to.
        types: One entry per type, lowest NFN first.
        ties: Neighbours whose order holds in less than 95 % of the resamples of the samples or of the layers.
        set_over_samples: Share of resamples of the samples with the same k lowest types.
        set_over_layers: Share of resamples of the layers with the same k lowest types.
        tau_samples: Mean Kendall's tau between the type orders of two resamples of the samples; None for one sample.
        tau_layers: The same for resamples of the layers.
        auto: The choice of automatic k, and every boundary that it tested.
        signal: Whether the ranking carries a signal.
        module_intervals: [M, 2] 95 % interval of each module over resamples of the samples; NaN for a single sample.
        samples: S.
        seed: Seed of the resamples.
    """

    k: int
    types: tuple[TypeStatistics, ...]
    ties: tuple[Tie, ...]
    set_over_samples: float
    set_over_layers: float
    tau_samples: float | None
    tau_layers: float
    auto: AutoK
    signal: Signal
    module_intervals: Floats
    samples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the module intervals, ready for JSON."""
        return {
            "k": self.k,
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "seed": self.seed,
            "signal": vars(self.signal),
            "types": [vars(item) for item in self.types],
            "ties": [vars(tie) for tie in self.ties],
            "set_over_samples": self.set_over_samples,
            "set_over_layers": self.set_over_layers,
            "kendall_tau_samples": self.tau_samples,
            "kendall_tau_layers": self.tau_layers,
            "auto": {
                "k": self.auto.k,
                "found": self.auto.found,
                "reason": self.auto.reason,
                "boundaries": [vars(item) | {"survives": item.survives} for item in self.auto.boundaries],
            },
        }


def summarize(table: GainTable, k: int | None = None, seed: int = 0) -> Statistics:
    """Compute all statistics of a table.

    Args:
        table: The totals.
        k: Cut of the ranking; default 3, or all types if there are fewer.
        seed: Seed of all resamples.
    """
    n_types = len(table.types)
    k = min(DEFAULT_TYPES, n_types) if k is None else k
    nfn = table.type_nfn(table.all_samples)[0]
    known = table.samples > 1
    # One sample has no spread: its resamples would all be equal, and look certain.
    samples = types_over_samples(table, seed=seed) if known else nfn[None, :]
    modules = (
        interval(modules_over_samples(table, seed=seed)).T if known else np.full((len(table.baseline), 2), np.nan)
    )
    layers = types_over_layers(table, seed=seed)
    each = without_each_layer(table)
    _, _, counts = table.layer_sums()
    deep = (counts > 0).sum(axis=1) > 1
    p_samples, p_layers = among_lowest(samples, k), among_lowest(layers, k)
    sample_ranges, layer_ranges = interval(samples), interval(layers)
    types = tuple(
        TypeStatistics(
            label,
            float(nfn[i]),
            _range(sample_ranges[:, i]) if known else None,
            _range(layer_ranges[:, i]) if deep[i] else None,
            (float(each[:, i].min()), float(each[:, i].max())) if deep[i] else None,
            float(p_samples[i]) if known else None,
            float(p_layers[i]),
        )
        for i, label in enumerate(table.types)
    )
    hold = neighbours_hold(samples) * known, neighbours_hold(layers)
    ties = tuple(
        Tie(table.types[i], table.types[i + 1], float(hold[0][i]), float(hold[1][i]), i + 1 == k)
        for i in range(n_types - 1)
        if min(hold[0][i], hold[1][i]) < TIED
    )
    whole = k >= n_types
    return Statistics(
        k=k,
        types=types,
        ties=ties,
        set_over_samples=1.0 if whole else float(set_holds(samples)[k - 1]) * known,
        set_over_layers=1.0 if whole else float(set_holds(layers)[k - 1]),
        tau_samples=mean_tau(samples) if known else None,
        tau_layers=mean_tau(layers),
        auto=auto_k(table, seed=seed),
        signal=find_signal(table, seed=seed),
        module_intervals=modules,
        samples=table.samples,
        seed=seed,
    )


def _range(pair: Floats) -> Range:
    return float(pair[0]), float(pair[1])
