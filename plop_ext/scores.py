"""The result of a scoring run: immutable, with its provenance, saved and loaded as JSON. Never touches a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from plop_ext.errors import InputError
from plop_ext.files import read_json, write_text_atomic
from plop_ext.module_types import family
from plop_ext.totals import TOTALS_FIELDS

if TYPE_CHECKING:
    from plop_ext.placement import Placement

FORMAT = "plop_ext.scores"
FORMAT_VERSION = 1
# The published script's list, matched as substrings of module names.
PAPER_GROUPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")


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


@dataclass(frozen=True)
class UnscoredModule:
    """A module without a score.

    Attributes:
        name: Full module name.
        layer_class: Class of the module.
        reason: One phrase, the same for all modules it holds for.
        detail: What the reason leaves out, such as how many tokens an expert saw.
    """

    name: str
    layer_class: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class TypeScore:
    """NFN of one module type.

    Attributes:
        type: Label.
        nfn: Mean over the modules of the type (ratio of sums with `compat="paper-script"`).
        modules: How many modules.
        lowest: Lowest module NFN.
        highest: Highest module NFN.
        family: `"attention"`, `"mlp"` or `"other"`.
    """

    type: str
    nfn: float
    modules: int
    lowest: float
    highest: float
    family: str


@dataclass(frozen=True, eq=False)
class Scores:
    """NFN of every scored module of a model on a data sample.

    Attributes:
        modules: What was scored, in the model's order.
        totals: [M, S, 5] float64, read-only: the sums of `TOTALS_FIELDS` per module and sample.
        sample_ids: [S] int64: each sample's id (its position in the data, where the data says so).
        sample_batches: [S] int64: the batch each sample was in.
        unscored: Linear-like modules without a score, and why.
        provenance: Model, data, settings, backend and library versions of the run.
    """

    modules: tuple[ScoredModule, ...]
    totals: NDArray[np.float64]
    sample_ids: NDArray[np.int64]
    sample_batches: NDArray[np.int64]
    unscored: tuple[UnscoredModule, ...]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        for array in (self.totals, self.sample_ids, self.sample_batches):
            array.setflags(write=False)

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
        # The script averages its batches' means without weights, and its zero inputs count as gain zero.
        counted = self.totals[:, :, 2] + self.totals[:, :, 3]
        members = [self.sample_batches == batch for batch in np.unique(self.sample_batches)]
        gains = np.array([self.totals[:, member, 0].sum(axis=1) for member in members])
        tokens = np.array([counted[:, member].sum(axis=1) for member in members])
        # A batch that did not call a module has no mean of it.
        called = tokens > 0
        return np.divide(gains, tokens, out=np.zeros_like(gains), where=called).sum(axis=0) / called.sum(axis=0)

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
        nfn = self.nfn
        groups = self._paper_groups() if self.paper_script else self._groups()
        scores = []
        for label, members in groups.items():
            value = self._paper_type_nfn(members) if self.paper_script else float(nfn[members].mean())
            name = self.modules[members[0]].name
            scores.append(
                TypeScore(
                    label,
                    value,
                    len(members),
                    float(nfn[members].min()),
                    float(nfn[members].max()),
                    family(label, name),
                )
            )
        return tuple(sorted(scores, key=lambda score: (score.nfn, score.type)))

    def place(
        self,
        types: int | Sequence[str] | None = None,
        *,
        modules: int | float | None = None,
        max_nfn: float | None = None,
        strategy: str = "lowest",
        seed: int = 0,
    ) -> Placement:
        """Choose where LoRA goes. Exactly one of `types`, `modules` and `max_nfn`, or none for the strategy's default.

        Args:
            types: How many module types (default 3, as in the paper), or their labels.
            modules: Single modules instead of types: how many (int), or which fraction (float in (0, 1]).
            max_nfn: All single modules with an NFN of at most this.
            strategy: `"lowest"` NFN first; `"inverse"`: highest first, an ablation; `"random"`: seeded; `"attention"`,
                `"mlp"`, `"all"`: by kind, no score needed.
            seed: Seed of `"random"`.

        Returns:
            The placement, ready for `Placement.lora_config`.

        Raises:
            InputError: If the arguments exclude each other, a count is out of range or a label is unknown.
        """
        from plop_ext.placement import select

        return select(self, types=types, modules=modules, max_nfn=max_nfn, strategy=strategy, seed=seed)

    def paper_metrics(self) -> dict[str, dict[str, float]]:
        r"""`actual` and `random` of each module at the published script's scale: gain over RMS(W) and over K.

        Raises:
            InputError: If the weight norms are unknown.
        """
        metrics = {}
        for module, gain in zip(self.modules, self.gain, strict=True):
            scale = 1.0 / (self._weight_rms(module) * module.in_features)
            metrics[module.name] = {"actual": float(gain * scale), "random": module.baseline * scale}
        return metrics

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to `path`, whole or not at all."""
        modules = [
            {
                **vars(module),
                "totals": {field: row.tolist() for field, row in zip(TOTALS_FIELDS, table.T, strict=True)},
            }
            for module, table in zip(self.modules, self.totals, strict=True)
        ]
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "provenance": dict(self.provenance),
            "types": [vars(score) for score in self.by_type()],
            "samples": {"ids": self.sample_ids.tolist(), "batches": self.sample_batches.tolist()},
            "modules": modules,
            "unscored": [vars(item) for item in self.unscored],
        }
        write_text_atomic(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote.

        Raises:
            InputError: If the file is missing, is no scores file, or has another version.
        """
        content = read_json(path, FORMAT, FORMAT_VERSION, "`plop score`")
        try:
            tables = [module.pop("totals") for module in content["modules"]]
            totals = [[table[field] for field in TOTALS_FIELDS] for table in tables]
            lists = content["samples"]
            scores = cls(
                modules=tuple(
                    ScoredModule(**{**module, "target_shape": tuple(module["target_shape"])})
                    for module in content["modules"]
                ),
                totals=np.array(totals, dtype=np.float64).transpose(0, 2, 1).copy(),
                sample_ids=np.array(lists["ids"], dtype=np.int64),
                sample_batches=np.array(lists["batches"], dtype=np.int64),
                unscored=tuple(UnscoredModule(**item) for item in content["unscored"]),
                provenance=content["provenance"],
            )
            samples = scores.totals.shape[1]
            if scores.sample_ids.shape != (samples,) or scores.sample_batches.shape != (samples,):
                raise ValueError
            scores.by_type()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"`{path}` is a damaged scores file; write it again with `plop score`") from error
        return scores

    def _groups(self) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {}
        for index, module in enumerate(self.modules):
            groups.setdefault(module.type, []).append(index)
        return groups

    def _paper_groups(self) -> dict[str, list[int]]:
        names = self.module_names
        found = {group: [i for i, name in enumerate(names) if group in name] for group in PAPER_GROUPS}
        return {group: members for group, members in found.items() if members}

    def _paper_type_nfn(self, members: list[int]) -> float:
        """Ratio of the sums of the script's `actual` and `random`, which are scaled by each module's RMS weight."""
        rms = np.array([self._weight_rms(self.modules[i]) for i in members])
        return float((self.gain[members] / rms).sum() / (self.baseline[members] / rms).sum())

    @staticmethod
    def _weight_rms(module: ScoredModule) -> float:
        if module.weight_norm is None:
            raise InputError(f"the weight norm of `{module.name}` is unknown; the published script's scale needs it")
        return module.weight_norm / (module.in_features * module.out_features) ** 0.5
