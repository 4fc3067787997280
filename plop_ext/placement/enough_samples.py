"""The check that enough samples were scored for a choice."""

from __future__ import annotations

from plop_ext._warnings import warn
from plop_ext.placement.data import PlacementData
from plop_ext.score_data import ScoreData
from plop_ext.statistics import MIN_SAMPLES_MODULES, StopRule, set_stability


def warn_of_too_few_samples(
    scores: ScoreData, placement: PlacementData, modules: int | float | None, single: bool
) -> None:
    """Warn if too few samples were scored for `placement`.

    Single modules need 64 samples. A run that stopped early has shown only that the set of its stop rule is stable.
    For another set, the stability is computed here, by resampling the same samples.

    Args:
        scores: The scores of the choice.
        placement: The choice, by the lowest or the highest NFN.
        modules: Number or fraction of single modules that you gave, or None.
        single: Whether single modules were chosen.
    """
    if scores.paper_script:
        return
    samples, stop = len(scores.sample_ids), scores.provenance.get("stop") or {}
    settled = stop.get("modules") if single else stop.get("types")
    wanted = modules if single else len(placement.types)
    if wanted is not None and wanted == settled:
        return
    if single and samples < MIN_SAMPLES_MODULES:
        rule = _rule("modules", len(placement.modules))
        fix = "max_samples=64 (plop score --samples 64)" if modules is None else rule
        warn(
            f"single modules were chosen from {samples} samples, but their order needs {MIN_SAMPLES_MODULES} samples; "
            f"score again with {fix}"
        )
        return
    if stop.get("settled") and wanted is not None:
        _warn_of_another_set(scores, placement, stop, single)


def _warn_of_another_set(scores: ScoreData, placement: PlacementData, stop: dict[str, int], single: bool) -> None:
    """Warn if too few resamples give the chosen set."""
    what = "modules" if single else "types"
    count = len(placement.modules if single else placement.types)
    if placement.strategy == "inverse":  # the k highest are all but the n - k lowest
        count = len(scores.candidates if single else scores.types) - count
        if not count:
            return
    rule = StopRule(modules=count) if single else StopRule(types=count)
    stability = set_stability(scores.table, rule)
    if stability < rule.confidence:
        settled = f"{stop['types']} types" if stop.get("modules") is None else "modules"
        warn(
            f"scoring stopped after {len(scores.sample_ids)} samples, when the lowest {settled} had settled; only "
            f"{stability:.0%} of bootstrap resamples give the same {what} as chosen here; score again with "
            f"{_rule(what, count)}"
        )


def _rule(what: str, count: int) -> str:
    return f"stop=StopRule({what}={count}) (plop score --settle-{what} {count})"
