"""The input of every statistic: gains and tokens per module and sample, and the type and layer of each module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from plop_ext.totals import Totals

Floats = NDArray[np.float64]

# Groups of modules that are resampled together, which bounds the memory.
_BLOCK = 4096


class Module(Protocol):
    """The attributes of a module that a table needs; a `ScoredModule` or a layer that is being scored has them."""

    @property
    def type(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def out_features(self) -> int: ...


@dataclass(frozen=True, eq=False)
class _Groups:
    """Groups of modules of one type with the same tokens.

    Attributes:
        types: [G] position of the type.
        gain: [G, S] sum over the modules of their gains over their baselines.
        tokens: [G, S] tokens that each of the modules counted.
        modules: [G] number of modules.
    """

    types: NDArray[np.int64]
    gain: Floats
    tokens: Floats
    modules: Floats


@dataclass(frozen=True, eq=False)
class GainTable:
    """Totals of a scoring run, ready to be resampled.

    Attributes:
        sum_gain: [M, S] sum of the gains of the counted tokens.
        tokens: [M, S] counted tokens.
        baseline: [M] gain on random inputs.
        out_features: [M] rows of the weight.
        types: T labels, lowest NFN first.
        type_index: [M] position of each module's type in `types`.
        layer: [M] block index of each module, -1 outside the blocks.
    """

    sum_gain: Floats
    tokens: Floats
    baseline: Floats
    out_features: Floats
    types: tuple[str, ...]
    type_index: NDArray[np.int64]
    layer: NDArray[np.int64]

    @classmethod
    def of_modules(cls, totals: Totals, baseline: Floats, modules: Sequence[Module]) -> GainTable:
        """Make a table of the totals and the baselines [M] of `modules`."""
        return cls.make(
            totals.sum_gain,
            totals.tokens,
            baseline,
            np.array([module.out_features for module in modules], dtype=np.float64),
            [module.type for module in modules],
            [module.layer for module in modules],
        )

    @classmethod
    def make(
        cls,
        sum_gain: Floats,
        tokens: Floats,
        baseline: Floats,
        out_features: Floats,
        types: Sequence[str],
        layers: Sequence[int | None],
    ) -> GainTable:
        """Make a table from one type label and one block index (or None) per module; types are sorted by NFN."""
        places = {label: place for place, label in enumerate(dict.fromkeys(types))}
        labels = tuple(places)
        index = np.array([places[label] for label in types], dtype=np.int64)
        layer = np.array([-1 if value is None else value for value in layers], dtype=np.int64)
        table = cls(sum_gain, tokens, baseline, out_features, labels, index, layer)
        values = table.type_nfn(table.all_samples)[0]
        order = sorted(range(len(labels)), key=lambda i: (values[i], labels[i]))
        place = np.empty(len(labels), dtype=np.int64)
        place[order] = np.arange(len(labels))
        ranked = tuple(labels[i] for i in order)
        return replace(table, types=ranked, type_index=place[index])

    @property
    def samples(self) -> int:
        """S."""
        return self.tokens.shape[1]

    @property
    def all_samples(self) -> Floats:
        """[1, S] weights that count every sample once."""
        return np.ones((1, self.samples))

    def module_nfn(self, weights: Floats) -> Floats:
        """Return NFN of each module if sample s counts `weights[r, s]` times: a ratio of sums over all tokens.

        Args:
            weights: [R, S].

        Returns:
            [R, M]; NaN where no token is left.
        """
        tokens = weights @ self.tokens.T
        gain = np.divide(weights @ self.sum_gain.T, tokens, out=np.full_like(tokens, np.nan), where=tokens > 0)
        return gain / self.baseline

    def type_nfn(self, weights: Floats) -> Floats:
        """Return [R, T] NFN of each type: the mean of its modules that have tokens left."""
        # Few samples have few distinct resamples: 4 samples have 35, and a bootstrap takes 1000.
        distinct, place = np.unique(weights, axis=0, return_inverse=True)
        groups = self._groups
        sums, counts = np.zeros((len(self.types), len(distinct))), np.zeros((len(self.types), len(distinct)))
        for start in range(0, len(groups.modules), _BLOCK):
            part = slice(start, start + _BLOCK)
            tokens = groups.tokens[part] @ distinct.T
            gain = groups.gain[part] @ distinct.T
            size = groups.modules[part, None]
            known = tokens > 0
            np.add.at(sums, groups.types[part], np.divide(gain, tokens, out=np.zeros_like(gain), where=known))
            np.add.at(counts, groups.types[part], np.where(known, size, 0.0))
        return _means(sums, counts).T[place.reshape(-1)]

    @cached_property
    def _groups(self) -> _Groups:
        """The modules that share a type and saw the same tokens, whose gains can be added before any resampling."""
        streams: dict[bytes, int] = {}
        stream = np.array([streams.setdefault(row.tobytes(), len(streams)) for row in self.tokens], dtype=np.int64)
        keys, first, group = np.unique(self.type_index * len(streams) + stream, return_index=True, return_inverse=True)
        gain = np.zeros((len(keys), self.samples))
        np.add.at(gain, group, self.sum_gain / self.baseline[:, None])
        sizes = np.bincount(group).astype(np.float64)
        return _Groups(self.type_index[first], gain, self.tokens[first], sizes)

    def type_means(self, modules: Floats) -> Floats:
        """Return [R, T] means over the modules of each type from [R, M] values; NaN modules are excluded."""
        known = np.isfinite(modules)
        sums, counts = np.zeros((len(self.types), len(modules))), np.zeros((len(self.types), len(modules)))
        np.add.at(sums, self.type_index, np.where(known, modules, 0.0).T)
        np.add.at(counts, self.type_index, known.T.astype(np.float64))
        return _means(sums, counts).T

    def layer_sums(self) -> tuple[NDArray[np.int64], Floats, Floats]:
        """Return the distinct layers [L], and per type and layer [T, L] the sum and the number of its modules' NFN."""
        nfn = self.module_nfn(self.all_samples)[0]
        layers, position = np.unique(self.layer, return_inverse=True)
        sums, counts = np.zeros((len(self.types), len(layers))), np.zeros((len(self.types), len(layers)))
        np.add.at(sums, (self.type_index, position), nfn)
        np.add.at(counts, (self.type_index, position), 1.0)
        return layers, sums, counts


def _means(sums: Floats, counts: Floats) -> Floats:
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
