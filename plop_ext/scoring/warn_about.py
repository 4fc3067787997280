"""The warnings about the scores of a run."""

from __future__ import annotations

import logging

from plop_ext._warnings import warn
from plop_ext.layers.experts import ExpertsAdapter
from plop_ext.score_data.modules import FEW_ROUTED, MIN_EXPERT_TOKENS
from plop_ext.scores import Scores
from plop_ext.scoring.outcome import Outcome

logger = logging.getLogger(__name__)

# Fewest counted tokens of a sample without a warning.
FEW_TOKENS = 16
# What a sample may lack, by the scope of a run.
_ITEMS = {"vision": "image", "audio": "sound"}


def warn_of_scope(asked: str, found: str) -> None:
    """Warn if another part of the model was searched than the one that was asked for."""
    if found != asked:
        warn(f'`scope`="{asked}": the model has no {asked} part with layers to score; scored with scope="{found}"')


def warn_about(scores: Scores, outcome: Outcome, *, asked_fast: bool = False) -> None:
    """Warn of each problem of the result; of fused kernels that did not run only if they were asked for."""
    if scores.part:
        warn(f"the model lacks some of its blocks: the scores are of {scores.part}")
    fast = scores.provenance.get("fast")
    if asked_fast and fast is not None and fast["reason"] is not None:
        effect = f"speeds up {fast['blocks']} blocks" if fast["blocks"] else "has no effect"
        warn(f"`fast=True` {effect}: {fast['reason']}")
    per_sample = scores.totals.tokens.max(axis=0)
    step = scores.provenance["settings"]["token_step"]
    unread = int((per_sample == 0).sum()) if step > 1 else 0
    if unread:
        warn(
            f"`token_step`={step} read no token of {unread} of {len(per_sample)} samples, because they have few "
            "counted tokens; lower `token_step`"
        )
    # The tokens that a sample holds, not those that were read.
    few = int((per_sample * step < FEW_TOKENS).sum()) - unread
    item = _ITEMS.get(scores.provenance["settings"].get("scope", ""))
    without = int((per_sample == 0).sum()) if item is not None and step == 1 else 0
    if without:
        few -= without
        logger.info("%d of %d samples hold no %s", without, len(per_sample), item)
    if few:
        warn(
            f"{few} of {len(per_sample)} samples have fewer than {FEW_TOKENS} counted tokens; "
            "use longer samples, or more of them"
        )
    if scores.nonfinite is not None:
        warn(f"{scores.nonfinite}; these scores are not placed, see `ignore_nonfinite` of `place`")
    nonfinite = scores.totals.skipped_nonfinite.sum(axis=1)
    if nonfinite.any():
        worst = int(nonfinite.argmax())
        warn(
            f"{int(nonfinite.sum())} token features are NaN or infinite and were excluded, most in "
            f"`{scores.modules[worst].name}` ({int(nonfinite[worst])})"
        )
    zero = scores.totals.skipped_zero.sum(axis=1)
    if zero.any() and scores.provenance["settings"]["compat"] is None:  # the script counts them as a gain of zero
        worst = int(zero.argmax())
        warn(
            f"{int(zero.sum())} token features have an input of zeros and were excluded, most in "
            f"`{scores.modules[worst].name}` ({int(zero[worst])})"
        )
    few_routed = [item for item in scores.unscored if item.reason == FEW_ROUTED]
    if few_routed:
        scored = sum(module.kind == ExpertsAdapter.kind for module in scores.modules)
        stop = scores.provenance.get("stop") or {}
        remedy = "use more samples"
        if stop.get("settled"):
            remedy = "the choice settled without them; to score them too, give `max_samples` instead of `stop`"
        warn(
            f"{len(few_routed)} expert projections of {len(few_routed) + scored} are not scored: fewer than "
            f"{MIN_EXPERT_TOKENS} tokens of {len(scores.sample_ids)} samples were routed to each; {remedy}"
        )
    missing = [item for item in scores.unscored if item.wanted and item.reason != FEW_ROUTED]
    if missing:
        names = ", ".join(f"`{item.name}` ({item.layer_class})" for item in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        warn(f"not scored: {names}{more}: {missing[0].reason}")
