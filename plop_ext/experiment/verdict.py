"""What an experiment shows: a decision for each candidate, and one sentence for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plop_ext.experiment.intervals import Difference

# Simultaneous coverage of all intervals of an experiment.
CONFIDENCE = 0.95

BETTER, EQUAL, WORSE, UNDECIDED = "better", "no difference", "worse", "not decided"
DIVERGED, DROPPED, REFERENCE = "diverged", "not in the final", "reference"


@dataclass(frozen=True)
class Finding:
    """What is known of a candidate at the end.

    Attributes:
        label: The candidate.
        validation_loss: Loss by which it was tuned; infinity if all its rates diverged.
        diverged: Whether it diverged.
        difference: Its difference from the reference on the test rows; None for the reference, without a final, and
            after a divergence.
        cost: Memory that training adds, in bytes, or another number by which the cheaper of two is found.
        saving: What the candidate saves against the reference, in words.
    """

    label: str
    validation_loss: float
    diverged: bool
    difference: Difference | None
    cost: float
    saving: str = ""


@dataclass(frozen=True)
class Verdict:
    """The result of an experiment.

    Attributes:
        decision: `"better"`: the winner is better than the reference; `"worse"`: the reference is better than every
            other; `"no difference"`: the winner is the cheaper of those that differ by less than the margin;
            `"not decided"`; `"alone"`: no other candidate was left; `"diverged"`: none was left at all.
        winner: Label of the candidate whose adapter is kept; None if all diverged.
        sentence: The verdict in words.
        margin: Largest difference that counts as none, in nats per token.
        confidence: Simultaneous coverage of all intervals.
        outcomes: Outcome of each candidate, by label.
    """

    decision: str
    winner: str | None
    sentence: str
    margin: float
    confidence: float
    outcomes: Mapping[str, str]


def judge(findings: Sequence[Finding], reference: str | None, margin: float) -> Verdict:
    """Decide.

    A candidate is better or worse than the reference if its interval excludes 0, and no different if its interval is
    inside the margin; the second takes precedence, because a difference below the margin is not worth its cost.

    Args:
        findings: All candidates.
        reference: The candidate that the others were compared with in the final; None if every candidate diverged.
        margin: Largest difference that counts as none, in nats per token.
    """
    outcomes = {item.label: _outcome(item, reference, margin) for item in findings}

    def verdict(decision: str, winner: str | None, sentence: str) -> Verdict:
        return Verdict(decision, winner, sentence, margin, CONFIDENCE, outcomes)

    if reference is None:
        return verdict("diverged", None, "Every candidate diverged; give lower learning rates.")
    compared = [item for item in findings if item.difference is not None]
    if not compared:
        return verdict("alone", reference, f"{reference} had no other candidate to be compared with in the final.")
    group = {
        name: [item for item in compared if outcomes[item.label] == name] for name in (BETTER, EQUAL, WORSE, UNDECIDED)
    }
    if group[BETTER]:
        best = min(group[BETTER], key=lambda item: item.validation_loss)
        rest = f" (of {len(group[BETTER])} better ones the best on the validation rows)" * (len(group[BETTER]) > 1)
        return verdict("better", best.label, f"{best.label} is better than {reference}{rest}: {_words(best)}.")
    home = next(item for item in findings if item.label == reference)
    if group[EQUAL]:
        cheapest = min(group[EQUAL], key=lambda item: item.cost)
        winner, saving = (cheapest.label, cheapest.saving) if cheapest.cost < home.cost else (reference, "")
        taken = f"{winner} is taken because it is the cheaper one" + (f": {saving}" if saving else "")
        return verdict(
            "no difference",
            winner,
            f"{cheapest.label} and {reference} differ by less than {margin:g} nats per token: {_words(cheapest)};"
            f" {taken}.",
        )
    if not group[UNDECIDED]:
        nearest = min(group[WORSE], key=lambda item: item.validation_loss)
        others = f"all {len(compared)} others" if len(compared) > 1 else nearest.label
        which = f" of {nearest.label}, the best of them on the validation rows," if len(compared) > 1 else ""
        return verdict(
            "worse", reference, f"{reference} is better than {others}: the difference{which} is {_words(nearest)}."
        )
    nearest = min(group[UNDECIDED], key=lambda item: item.validation_loss)
    return verdict(
        "not decided",
        reference,
        f"Not decided between {nearest.label} and {reference}: {_words(nearest)}, neither beyond 0 nor within"
        f" {margin:g}; {_needed(nearest, margin)}. The adapter is that of {reference}.",
    )


def _outcome(item: Finding, reference: str | None, margin: float) -> str:
    if item.diverged:
        return DIVERGED
    if item.label == reference:
        return REFERENCE
    found = item.difference
    if found is None:
        return DROPPED
    if not found.known:
        return UNDECIDED
    if -margin <= found.low and found.high <= margin:
        return EQUAL
    if found.high < 0:
        return BETTER
    return WORSE if found.low > 0 else UNDECIDED


def _words(item: Finding) -> str:
    found = item.difference
    assert found is not None
    comparisons = round((1 - CONFIDENCE) / (1 - found.confidence))
    corrected = f", corrected for {comparisons} comparisons" if comparisons > 1 else ""
    return (
        f"{found.mean:+.4f} nats per token ({100 * CONFIDENCE:g} % interval {found.low:+.4f} to {found.high:+.4f}"
        f"{corrected}; {found.rows} test rows, {found.seeds} seed{'s' * (found.seeds > 1)})"
    )


def _needed(item: Finding, margin: float) -> str:
    found = item.difference
    assert found is not None
    if found.seeds < 2:
        return "one seed shows no spread between runs: give at least 3"
    if found.rows < 2:
        return "one test row shows no spread between rows: give more"
    needed = found.needed(margin)
    if needed is None:
        return "the spread between seeds is too large to decide a difference of this size"
    return f"a difference of this size would take about {needed[0]:,} test rows and {needed[1]} seeds"
