"""Whether the samples that were scored bear the choice that is asked of them."""

from __future__ import annotations

from plop_ext._warnings import warn
from plop_ext.placement.placement import Placement
from plop_ext.score_data import ScoreData
from plop_ext.statistics import MIN_SAMPLES_MODULES, StopRule, set_stability


def warn_of_samples(scores: ScoreData, placement: Placement, modules: int | float | None, single: bool) -> None:
    """Warn where too little was scored for `placement`.

    Single modules need 64 samples. A run that ended early did so when the set that its rule watched had settled; of
    another set the samples say themselves whether it holds.

    Args:
        scores: What was chosen from.
        placement: The choice, by the lowest or the highest NFN.
        modules: How many single modules, or which fraction, were asked for.
        single: Whether it is of single modules.
    """
    if scores.paper_script:
        return
    samples, stop = len(scores.sample_ids), scores.provenance.get("stop") or {}
    watched = stop.get("modules") if single else stop.get("types")
    wanted = modules if single else len(placement.types)
    if wanted is not None and wanted == watched:
        return
    if single and samples < MIN_SAMPLES_MODULES:
        fix = (
            "max_samples=64 (plop score --samples 64)" if modules is None else _rule("modules", len(placement.modules))
        )
        warn(
            f"single modules were chosen on {samples} samples, and their order needs {MIN_SAMPLES_MODULES}; score "
            f"again with {fix}"
        )
        return
    if not stop.get("settled") or wanted is None:
        return
    count = len(placement.modules if single else placement.types)
    if placement.strategy == "inverse":  # the k highest are all but the n - k lowest
        count = len(scores.modules if single else scores.types) - count
        if not count:
            return
    rule = StopRule(modules=count) if single else StopRule(types=count)
    stability = set_stability(scores.table, rule)
    if stability < rule.confidence:
        what = "modules" if single else "types"
        seen = f"{stop['types']} types" if stop.get("modules") is None else "modules"
        warn(
            f"scoring ended after {samples} samples, when the lowest {seen} had settled; these {what} are the same in "
            f"{stability:.0%} of draws of samples only; score again with {_rule(what, count)}"
        )


def _rule(what: str, count: int) -> str:
    return f"stop=StopRule({what}={count}) (plop score --settle-{what} {count})"
