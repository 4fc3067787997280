"""The modules of a scoring run: those with a score, and those with too few tokens for one."""

from __future__ import annotations

from dataclasses import dataclass

from plop_ext.lora_target import LoraTarget
from plop_ext.totals import Totals

# Experts with fewer tokens are not scored, because their means would be mostly noise.
MIN_EXPERT_TOKENS = 16
FEW_ROUTED = "too few tokens were routed to it"


def few_routed_detail(tokens: float) -> str:
    """Return the detail for an expert that is not scored because it saw only this many tokens."""
    return f"{tokens:.0f} of at least {MIN_EXPERT_TOKENS}"


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
        weight_norm: ||W||_F, or None if the weight cannot be read.
        target: The target that PEFT adapts for it.
        kind: Kind of layer: `"linear"`, `"Conv1D (transposed)"`, `"stacked experts"`, `"bitsandbytes 4-bit"`, ...
        baseline_from: Source of b: the `"weight"`, the `"dequantized"` weight, the matrix by which a `"forward"` of
            the module's own multiplies, the forward of the `"identity"` if the weight cannot be read, or random inputs
            (`"probe"`).
        no_place: Why the module is no place for LoRA; empty if it is a candidate.
    """

    name: str
    type: str
    layer: int | None
    in_features: int
    out_features: int
    baseline: float
    weight_norm: float | None
    target: LoraTarget
    kind: str = "linear"
    baseline_from: str = "weight"
    no_place: str = ""


@dataclass(frozen=True, eq=False)
class FewTokenModules:
    """Expert projections with too few routed tokens for a score, kept for a merge.

    Attributes:
        modules: The projections.
        totals: Their sums, as in `ScoreData.totals`.
        positions: Position of each among the scored modules and these, in the model's order.
    """

    modules: tuple[ScoredModule, ...]
    totals: Totals
    positions: tuple[int, ...]
