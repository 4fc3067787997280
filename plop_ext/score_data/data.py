"""The data of a scoring run, and the figures derived from it, without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plop_ext.arguments import check_seed, check_whole
from plop_ext.errors import InputError
from plop_ext.score_data import paper_script
from plop_ext.score_data.frozen import freeze
from plop_ext.score_data.modules import FewTokenModules, ScoredModule
from plop_ext.score_data.samples import SampleScores, token_moments
from plop_ext.score_data.types import TypeScore, members_by_type, score_types
from plop_ext.statistics import GainTable, Signal, Statistics, find_signal, summarize
from plop_ext.totals import Totals
from plop_ext.unscored import UnscoredModule


@dataclass(frozen=True, eq=False)
class ScoreData:
    """NFN of every scored module of a model on a data sample.

    `plop_ext.Scores` adds placing, merging and saving.

    Attributes:
        modules: The scored modules, in the model's order.
        totals: Sums over the tokens of each module and sample; read-only.
        sample_ids: [S] int64 id of each sample; with `plop_ext.data.batches`, its row number in the data set.
        sample_batches: [S] int64 batch of each sample.
        unscored: Modules with a weight but without a score, with the reason.
        provenance: Model, data, settings, backend and library versions of the run; a read-only copy.
        few_tokens: Experts to which too few tokens were routed for a score; None if there are no such experts.
    """

    modules: tuple[ScoredModule, ...]
    totals: Totals
    sample_ids: NDArray[np.int64]
    sample_batches: NDArray[np.int64]
    unscored: tuple[UnscoredModule, ...]
    provenance: Mapping[str, Any]
    few_tokens: FewTokenModules | None = None

    def __post_init__(self) -> None:
        for array in (self.totals.values, self.sample_ids, self.sample_batches):
            array.setflags(write=False)
        object.__setattr__(self, "provenance", freeze(self.provenance))

    @property
    def module_names(self) -> tuple[str, ...]:
        """Full names of the scored modules, in the model's order."""
        return tuple(module.name for module in self.modules)

    @cached_property
    def candidates(self) -> NDArray[np.int64]:
        """Positions of the modules that are candidates for LoRA (`ScoredModule.no_place` is empty)."""
        return np.flatnonzero([not module.no_place for module in self.modules])

    @property
    def types(self) -> tuple[str, ...]:
        """Labels of the types that are candidates for LoRA, lowest NFN first."""
        return tuple(score.type for score in self.by_type())

    @property
    def tokens(self) -> int:
        """Number of counted tokens, of the module that has the most."""
        return int(self.totals.tokens.sum(axis=1).max())

    @property
    def paper_script(self) -> bool:
        """Whether the run followed the published script (`compat="paper-script"`)."""
        return self.provenance["settings"]["compat"] == "paper-script"

    @property
    def part(self) -> str | None:
        """Which blocks of the model were there to score, if others were missing."""
        return self.provenance.get("model", {}).get("part")

    @property
    def nonfinite(self) -> str | None:
        """The first modules with NaN or infinite weights or activations, in a phrase; None if there are none.

        The scores are then those of the tokens and modules that are left, and no sign of how the model works.
        """
        found = self.provenance.get("nonfinite")
        return None if found is None else str(found)

    @cached_property
    def content_hash(self) -> str:
        """Hash of the modules, the samples and their totals: equal for equal scores, whatever their file is called."""
        state = hashlib.blake2b(digest_size=16)
        state.update("\0".join(self.module_names).encode(errors="surrogatepass"))
        for array in (self.baseline, self.sample_ids, self.totals.values):
            state.update(f"\0{array.shape}".encode())
            state.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
        return state.hexdigest()

    @property
    def gain(self) -> NDArray[np.float64]:
        r"""[M] mean gain \(\lVert W z \rVert / \lVert z \rVert\) over the counted tokens."""
        if not self.paper_script:
            return self.totals.sum_gain.sum(axis=1) / self.totals.tokens.sum(axis=1)
        return paper_script.gain(self.totals, self.sample_batches)

    @property
    def baseline(self) -> NDArray[np.float64]:
        """[M] gain on random inputs."""
        return np.array([module.baseline for module in self.modules])

    @property
    def nfn(self) -> NDArray[np.float64]:
        """[M] normalized feature norm: `gain / baseline`. It is 1 if W responds to its inputs as to random vectors."""
        return self.gain / self.baseline

    def by_type(self) -> tuple[TypeScore, ...]:
        """Return one `TypeScore` per module type that is a candidate for LoRA, lowest NFN first."""
        return self._by_type

    @cached_property
    def _by_type(self) -> tuple[TypeScore, ...]:
        if self.paper_script:
            members = paper_script.groups(self.module_names)
            values = paper_script.group_nfn(self.modules, self.gain, members)
            return score_types(self.modules, self.nfn, members, values)
        return self._types_of(self.candidates.tolist())

    def no_place_by_type(self) -> tuple[TypeScore, ...]:
        """Return one `TypeScore` per module type that is scored but no place for LoRA, lowest NFN first."""
        return self._types_of([i for i, module in enumerate(self.modules) if module.no_place])

    def _types_of(self, positions: Sequence[int]) -> tuple[TypeScore, ...]:
        members, nfn = members_by_type(self.modules, positions), self.nfn
        values = {label: float(nfn[places].mean()) for label, places in members.items()}
        return score_types(self.modules, nfn, members, values)

    @cached_property
    def table(self) -> GainTable:
        """The totals of the candidates in the form that `plop_ext.statistics` reads.

        Raises:
            InputError: With `compat="paper-script"`, whose unweighted means have no such statistics.
        """
        if self.paper_script:
            raise InputError('scores with compat="paper-script" have no statistics; score without compat')
        kept = self.candidates
        return GainTable.of_modules(
            self.totals.of_modules(kept), self.baseline[kept], [self.modules[i] for i in kept.tolist()]
        )

    @cached_property
    def signal(self) -> Signal:
        """Whether the ranking has a signal: NFN is not 1 everywhere, and both halves of the data rank alike."""
        return find_signal(self.table)

    @property
    def placeable(self) -> bool:
        """Whether the scores are finite and carry a signal, so that `place` needs no further argument."""
        return self.nonfinite is None and (self.paper_script or self.signal.found)

    def statistics(self, k: int | None = None, seed: int = 0) -> Statistics:
        """Compute the certainty of the ranking: intervals, probabilities, ties, automatic k. Runs no model.

        Args:
            k: Number of lowest types to which probabilities and ties refer; default 3.
            seed: Seed of the resamples.

        Raises:
            InputError: If `k` is out of range, or with `compat="paper-script"`.
        """
        check_whole(least=-(2**63), k=k)
        check_seed(seed=seed)
        if k is not None and not 1 <= k <= len(self.table.types):
            raise InputError(f"`k` must be between 1 and {len(self.table.types)}, the number of types, got {k}")
        if (k, seed) not in self._summaries:
            self._summaries[k, seed] = summarize(self.table, k, seed)
        return self._summaries[k, seed]

    @cached_property
    def _summaries(self) -> dict[tuple[int | None, int], Statistics]:
        """Statistics by cut and seed: tables, figures and pages ask for the same ones, which take seconds."""
        return {}

    def per_sample(self) -> SampleScores:
        """Return the NFN of each module and type on each sample, for instance to find unusual prompts."""
        nfn, std = token_moments(self.totals, self.baseline)
        types = self.table.types
        return SampleScores(
            ids=self.sample_ids,
            data=self.sample_data,
            modules=self.module_names,
            types=types,
            tokens=self.totals.tokens.astype(np.int64),
            nfn=nfn,
            nfn_std=std,
            type_nfn=self.table.type_means(nfn[self.candidates].T).T,
        )

    @property
    def sample_data(self) -> tuple[str | None, ...]:
        """[S] name of the data of each sample, or None for unnamed data."""
        data = self.provenance.get("data", {})
        parts = data.get("parts") or [{"name": data.get("name"), "samples": len(self.sample_ids)}]
        return tuple(part["name"] for part in parts for _ in range(part["samples"]))
