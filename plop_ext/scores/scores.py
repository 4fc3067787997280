"""The result of a scoring run: immutable, with its provenance, saved and loaded as JSON. Never touches a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from plop_ext.errors import InputError
from plop_ext.score_data import paper_script
from plop_ext.score_data.few_tokens import ThinModules
from plop_ext.score_data.frozen import freeze
from plop_ext.score_data.samples import SampleScores, token_moments
from plop_ext.score_data.types import TypeScore, by_type
from plop_ext.statistics import GainTable, Signal, Statistics, find_signal, summarize
from plop_ext.unscored import UnscoredModule

if TYPE_CHECKING:
    from plop_ext.placement import Placement


@dataclass(frozen=True)
class ScoredModule:
    """One scored module.

    Attributes:
        name: Full module name.
        type: Label of its type.
        layer: Index of its block, or None.
        in_features: K.
        out_features: M.
        baseline: b, its gain on random inputs.
        weight_norm: ||W||_F, or None where the weight cannot be read.
        kind: What it is: `"linear"`, `"Conv1D (transposed)"`, `"fused experts"`, `"bitsandbytes 4-bit"`, ...
        baseline_from: What b comes from: the `"weight"`, the `"dequantized"` weight, the `"identity"` pushed through
            the module where its weight cannot be read, or random inputs (`"probe"`).
        target: Full name of the module, or of the parameter, that PEFT adapts to reach it; several parts of a fused
            weight and all experts of a layer share one. Empty: the module itself.
        target_parameter: Whether `target` is an entry of `target_parameters`.
        target_size: Parameters that LoRA of rank 1 adds to the whole target; 0: in_features + out_features.
        target_shape: (in_features, out_features) of the target module, or the shape of the target parameter.
        refused: Why PEFT cannot adapt it; empty if it can.
    """

    name: str
    type: str
    layer: int | None
    in_features: int
    out_features: int
    baseline: float
    weight_norm: float | None
    kind: str = "linear"
    baseline_from: str = "weight"
    target: str = ""
    target_parameter: bool = False
    target_size: int = 0
    target_shape: tuple[int, ...] = ()
    refused: str = ""


@dataclass(frozen=True, eq=False)
class Scores:
    """NFN of every scored module of a model on a data sample.

    Attributes:
        modules: What was scored, in the model's order.
        totals: [M, S, 5] float64, read-only: the sums of `TOTALS_FIELDS` per module and sample.
        sample_ids: [S] int64: each sample's id, of `plop_ext.data.batches` the number of its row in the data set.
        sample_batches: [S] int64: the batch each sample was in.
        unscored: Linear-like modules without a score, and why.
        provenance: Model, data, settings, backend and library versions of the run; read-only, and a copy.
        thin: Experts with too few tokens for a score; None without any.
    """

    modules: tuple[ScoredModule, ...]
    totals: NDArray[np.float64]
    sample_ids: NDArray[np.int64]
    sample_batches: NDArray[np.int64]
    unscored: tuple[UnscoredModule, ...]
    provenance: Mapping[str, Any]
    thin: ThinModules | None = None

    def __post_init__(self) -> None:
        for array in (self.totals, self.sample_ids, self.sample_batches):
            array.setflags(write=False)
        object.__setattr__(self, "provenance", freeze(self.provenance))

    @property
    def module_names(self) -> tuple[str, ...]:
        """Full names of the scored modules, in the model's order."""
        return tuple(module.name for module in self.modules)

    @property
    def types(self) -> tuple[str, ...]:
        """Type labels, lowest NFN first."""
        return tuple(score.type for score in self.by_type())

    @property
    def tokens(self) -> int:
        """Counted tokens: the most any module saw."""
        return int(self.totals[:, :, 2].sum(axis=1).max())

    @property
    def paper_script(self) -> bool:
        """Whether the run followed the published script (`compat="paper-script"`)."""
        return self.provenance["settings"]["compat"] == "paper-script"

    @property
    def gain(self) -> NDArray[np.float64]:
        r"""[M] mean gain \(\lVert W z \rVert / \lVert z \rVert\) over the counted tokens."""
        if not self.paper_script:
            return self.totals[:, :, 0].sum(axis=1) / self.totals[:, :, 2].sum(axis=1)
        return paper_script.gain(self.totals, self.sample_batches)

    @property
    def baseline(self) -> NDArray[np.float64]:
        """[M] gain on random inputs."""
        return np.array([module.baseline for module in self.modules])

    @property
    def nfn(self) -> NDArray[np.float64]:
        """[M] normalized feature norm: `gain / baseline`. 1 means the module sees its input as noise."""
        return self.gain / self.baseline

    def by_type(self) -> tuple[TypeScore, ...]:
        """One `TypeScore` per module type, lowest NFN first."""
        return by_type(self)

    @cached_property
    def table(self) -> GainTable:
        """The totals as `plop_ext.statistics` takes them.

        Raises:
            InputError: With `compat="paper-script"`, whose unweighted means have no such statistics.
        """
        if self.paper_script:
            raise InputError('scores with compat="paper-script" have no statistics; score without compat')
        return GainTable.make(
            self.totals[:, :, 0],
            self.totals[:, :, 2],
            self.baseline,
            np.array([module.out_features for module in self.modules], dtype=np.float64),
            [module.type for module in self.modules],
            [module.layer for module in self.modules],
        )

    @cached_property
    def signal(self) -> Signal:
        """Whether the ranking says anything: not all 1, and the same on both halves of the data."""
        return find_signal(self.table)

    def statistics(self, k: int | None = None, seed: int = 0) -> Statistics:
        """How sure the ranking is: intervals, probabilities, ties, automatic k. No model runs.

        Args:
            k: Cut of the ranking that probabilities and ties refer to; default 3.
            seed: Of the draws.

        Raises:
            InputError: If `k` is out of range, or with `compat="paper-script"`.
        """
        if k is not None and not 1 <= k <= len(self.table.types):
            raise InputError(f"`k` must be between 1 and {len(self.table.types)}, the number of types, got {k}")
        return summarize(self.table, k, seed)

    def per_sample(self) -> SampleScores:
        """NFN of each module and type on each sample, to route or audit prompts by how the model responds to them."""
        nfn, std = token_moments(self.totals, self.baseline)
        types = self.table.types
        return SampleScores(
            ids=self.sample_ids,
            data=self.sample_data,
            modules=self.module_names,
            types=types,
            tokens=self.totals[:, :, 2].astype(np.int64),
            nfn=nfn,
            nfn_std=std,
            type_nfn=self.table.type_means(nfn.T).T,
        )

    @property
    def sample_data(self) -> tuple[str | None, ...]:
        """[S] name of the data each sample is from, or None where it has none."""
        data = self.provenance.get("data", {})
        parts = data.get("parts") or [{"name": data.get("name"), "samples": len(self.sample_ids)}]
        return tuple(part["name"] for part in parts for _ in range(part["samples"]))

    @staticmethod
    def merge(parts: Sequence[Scores]) -> Scores:
        """Add runs over different samples of the same model.

        A sample is told by its id and the `data_name` of its run: id 3 of two data sets is two samples. Experts that
        saw too few tokens in each run have a score if all runs together have enough.

        Args:
            parts: Scores of the same modules at the same settings, such as those of the shards of a data set.

        Raises:
            InputError: If models or settings differ, or a sample is in two of them; the error names it.
        """
        from plop_ext.scores.merging import merge

        return merge(parts)

    def place(
        self,
        types: int | str | Sequence[str] | None = None,
        *,
        modules: int | float | None = None,
        max_nfn: float | None = None,
        strategy: str = "lowest",
        seed: int = 0,
        r: int | None = None,
        ranks: str | None = None,
        max_params: int | float | None = None,
        max_memory: int | float | None = None,
        batch: int = 8,
        seq: int = 1024,
    ) -> Placement:
        """Choose where LoRA goes. At most one of `types`, `modules` and `max_nfn`; none is the strategy's default.

        Args:
            types: How many module types (default 3, as in the paper), their labels, or `"auto"`: the cut nearest to 3
                that resampling does not move, else 3 or what the budget allows (`plop_ext.statistics.auto_k`).
            modules: Single modules instead of types: how many (int), or which fraction (float in (0, 1]).
            max_nfn: All single modules with an NFN of at most this.
            strategy: `"lowest"` NFN first; `"inverse"`: highest first, an ablation; `"random"`: seeded; `"attention"`,
                `"mlp"`, `"all"`: by kind, no score needed.
            seed: Seed of `"random"`.
            r: LoRA rank; default 16, or the largest that fits the budget.
            ranks: `"inverse-nfn"`: a rank per module in proportion to 1 / NFN, at the same number of parameters.
                Default one rank for all, which every serving engine takes.
            max_params: Most trainable parameters (int), or as a fraction of the model's (float below 1).
            max_memory: Most bytes that training adds (`Placement.cost`), or a fraction of the model's weights.
            batch: Samples in a training step, for `max_memory`.
            seq: Tokens in a sample, for `max_memory`.

        Returns:
            The placement, ready for `Placement.lora_config`.

        Raises:
            InputError: If the arguments exclude each other, a count is out of range, a label is unknown, nothing fits
                the budget, or the scores hold no signal and `types` was left to us; a number places anyway, with a
                warning.
        """
        from plop_ext.placement import select

        return select(
            self,
            types=types,
            modules=modules,
            max_nfn=max_nfn,
            strategy=strategy,
            seed=seed,
            r=r,
            ranks=ranks,
            max_params=max_params,
            max_memory=max_memory,
            batch=batch,
            seq=seq,
        )

    def paper_metrics(self) -> dict[str, dict[str, float]]:
        r"""`actual` and `random` of each module at the published script's scale: gain over RMS(W) and over K.

        Raises:
            InputError: If the weight norms are unknown.
        """
        return paper_script.metrics(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to `path`, whole or not at all: totals, scores by type, statistics, provenance."""
        from plop_ext.scores.file import write

        write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote.

        Raises:
            InputError: If the file is missing, is no scores file, or has another version.
        """
        from plop_ext.scores.file import read

        return read(path)
