"""`Evidence`: what a placement was chosen from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plop_ext.score_data import ScoreData


@dataclass(frozen=True)
class Evidence:
    """What a placement was chosen from.

    Attributes:
        scores_hash: Hash of the scores, `ScoreData.content_hash`.
        data: Name of the scored data, or None.
        data_hash: Hash of the scored batches, or None.
        samples: Number of scored samples.
        tokens: Number of counted tokens, of the module that has the most.
        nfn: NFN of each chosen type, lowest first.
        doubts: Reasons to doubt the choice: values of the model that are not finite, scores without signal.
    """

    scores_hash: str
    data: str | None
    data_hash: str | None
    samples: int
    tokens: int
    nfn: dict[str, float]
    doubts: tuple[str, ...] = ()

    @classmethod
    def of(cls, scores: ScoreData, types: Sequence[str], by_score: bool) -> Evidence:
        """Return the evidence of a choice.

        Args:
            scores: The scores of the choice.
            types: The types of the chosen modules.
            by_score: Whether the scores decided, so that it matters whether they carry a signal.
        """
        doubts = [] if scores.nonfinite is None else [scores.nonfinite]
        if by_score and not scores.paper_script and not scores.signal.found:
            doubts.append(f"no signal: {scores.signal.reason}")
        data = scores.provenance.get("data", {})
        return cls(
            scores_hash=scores.content_hash,
            data=data.get("name"),
            data_hash=data.get("hash"),
            samples=len(scores.sample_ids),
            tokens=scores.tokens,
            nfn={score.type: score.nfn for score in scores.by_type() if score.type in types},
            doubts=tuple(doubts),
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Evidence:
        """Make evidence from its fields in a file.

        Raises:
            TypeError, ValueError: If a field is missing, surplus or of another type.
        """
        evidence = cls(**{**fields, "doubts": tuple(fields["doubts"])})
        texts = [evidence.scores_hash, *evidence.doubts]
        optional = [value for value in (evidence.data, evidence.data_hash) if value is not None]
        counts = [evidence.samples, evidence.tokens]
        if not (
            all(isinstance(text, str) for text in [*texts, *optional, *evidence.nfn])
            and all(type(count) is int and count > 0 for count in counts)
            and all(type(value) in (int, float) and math.isfinite(value) for value in evidence.nfn.values())
        ):
            raise ValueError(f"no evidence: {evidence}")
        return evidence

    def sentence(self) -> str:
        """Return the evidence in words."""
        name = "unnamed data" if self.data is None else self.data
        values = ", ".join(f"{label} {value:.3f}" for label, value in self.nfn.items())
        return (
            f"scores {self.scores_hash} of {self.samples:,} samples ({self.tokens:,} tokens) of {name}; NFN: {values}"
        )
