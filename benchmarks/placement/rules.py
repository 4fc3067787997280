"""The candidate rules: a score for every module type, from which that of a triple is the sum.

The sign of a rule is fixed here, before any model that is held out is trained: a higher score is a better place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.placement.models import TYPES, layer_of, type_of

Array = NDArray[np.float64]
Values = Mapping[str, Mapping[str, float]]  # feature -> module -> value
BASELINE = "size"


@dataclass(frozen=True)
class Rule:
    """A candidate.

    Attributes:
        name: What it is called in results.
        family: What it needs: `"shape"`, `"weights"`, `"forward"`, `"backward"` or `"steps"` of training.
        score: Features of a model and task -> module -> score, higher is better.
        total: Whether a type's score is the sum over its modules; else their mean.
        reduce: How the mean is taken.
    """

    name: str
    family: str
    score: Callable[[Values], Mapping[str, float]]
    total: bool = False
    reduce: Callable[[Array], Any] = np.mean

    def of_types(self, values: Values) -> Array:
        """[7] the score of each type, in the order of `TYPES`."""
        groups: dict[str, list[float]] = {name: [] for name in TYPES}
        for module, value in self.score(values).items():
            groups[type_of(module)].append(value)
        reduce = np.sum if self.total else self.reduce
        return np.array([float(reduce(np.array(groups[name]))) for name in TYPES])


def _plain(feature: str, sign: int) -> Callable[[Values], Mapping[str, float]]:
    return lambda values: {module: sign * value for module, value in values[feature].items()}


def _product(*features: tuple[str, float]) -> Callable[[Values], Mapping[str, float]]:
    """The product of features to their powers."""

    def score(values: Values) -> Mapping[str, float]:
        modules = values[features[0][0]]
        return {
            module: float(np.prod([values[feature][module] ** power for feature, power in features]))
            for module in modules
        }

    return score


def _difference(feature: str, other: str, sign: int) -> Callable[[Values], Mapping[str, float]]:
    return lambda values: {module: sign * (value - values[other][module]) for module, value in values[feature].items()}


def _rank_in_layer(values: Values) -> Mapping[str, float]:
    """Minus the rank of a module's NFN among those of its layer."""
    nfn = values["nfn"]
    return {
        module: -float(sum(nfn[other] < value for other in nfn if layer_of(other) == layer_of(module)))
        for module, value in nfn.items()
    }


def _layers(inner: bool) -> Callable[[Values], Mapping[str, float]]:
    """Minus NFN without the first and last layer, or of these only."""

    def score(values: Values) -> Mapping[str, float]:
        last = max(map(layer_of, values["nfn"]))
        return {
            module: -value for module, value in values["nfn"].items() if (layer_of(module) in (0, last)) is not inner
        }

    return score


def _width_corrected(values: Values) -> Mapping[str, float]:
    """Minus NFN - 1 in units of what it varies by for a random matrix with as many outputs."""
    return {
        module: -(value - 1) * float(np.sqrt(2 * values["out_features"][module]))
        for module, value in values["nfn"].items()
    }


RULES = (
    Rule("size", "shape", _plain("weights", 1), total=True),
    Rule("adapter size", "shape", _plain("adapter", 1), total=True),
    Rule("nfn", "forward", _plain("nfn", -1)),
    Rule("nfn median", "forward", _plain("nfn", -1), reduce=np.median),
    Rule("nfn rank in layer", "forward", _rank_in_layer),
    Rule("nfn inner layers", "forward", _layers(inner=True)),
    Rule("nfn first and last layer", "forward", _layers(inner=False)),
    Rule("nfn of answers", "forward", _plain("nfn_answer", -1)),
    Rule("nfn by probes", "forward", _plain("nfn_probe", -1)),
    Rule("nfn by energy", "forward", _plain("nfn_energy", -1)),
    Rule("nfn width-corrected", "forward", _width_corrected),
    Rule("nfn task minus text", "forward", _difference("nfn", "nfn_text", -1)),
    Rule("size / nfn", "forward", _product(("weights", 1), ("nfn", -1)), total=True),
    Rule("adapter size / nfn", "forward", _product(("adapter", 1), ("nfn", -1)), total=True),
    Rule("weight norm", "weights", _plain("weight_norm", 1)),
    Rule("weight spectral norm", "weights", _plain("weight_spectral", -1)),
    Rule("weight stable rank", "weights", _plain("weight_stable_rank", 1)),
    Rule("weight effective rank", "weights", _plain("weight_effective_rank", 1)),
    Rule("weight condition", "weights", _plain("weight_condition", -1), reduce=np.median),
    Rule("input norm", "forward", _plain("input_norm", 1)),
    Rule("input effective rank", "forward", _plain("input_effective_rank", 1)),
    Rule("input participation", "forward", _plain("input_participation", 1)),
    Rule("input mean share", "forward", _plain("input_mean_share", -1)),
    Rule("output norm", "forward", _plain("output_norm", 1)),
    Rule("output effective rank", "forward", _plain("output_effective_rank", 1)),
    Rule("gradient l1", "backward", _plain("gradient_l1", 1), total=True),
    Rule("gradient frobenius", "backward", _plain("gradient_frobenius", 1)),
    Rule("gradient nuclear", "backward", _plain("gradient_nuclear", 1), total=True),
    Rule("gradient spectral", "backward", _plain("gradient_spectral", 1)),
    Rule("gradient x weight l1", "backward", _plain("gradient_weight_l1", 1), total=True),
    Rule("nfn change in first steps", "steps", _difference("nfn_early", "nfn", 1)),
    Rule("weight change in first steps", "steps", _plain("moved", 1)),
)
