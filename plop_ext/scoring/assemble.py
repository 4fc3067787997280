"""From totals to scores: what was scored, what was not and why, where it all comes from, and what to warn of."""

from __future__ import annotations

import datetime
import logging
import math
import platform
import time
from typing import Any, Protocol

import numpy as np
import torch

from plop_ext import ops
from plop_ext._warnings import warn
from plop_ext.errors import InputError
from plop_ext.layers import Discovery, LinearLayer
from plop_ext.layers.experts import ExpertsAdapter
from plop_ext.provenance import versions
from plop_ext.score_data import FewTokenModules, ScoredModule
from plop_ext.score_data.modules import FEW_ROUTED, MIN_EXPERT_TOKENS, few_routed_detail
from plop_ext.scores import Scores
from plop_ext.scoring import baseline as baselines
from plop_ext.totals import Totals
from plop_ext.unscored import UnscoredModule

logger = logging.getLogger(__name__)

FEW_TOKENS = 16


class Observed(Protocol):
    """What a `Collector` noticed beside the totals; see its attributes."""

    unmasked: set[str]
    unassigned: dict[str, str]
    experts_implementation: str | None


def describe_run(
    model: dict[str, Any],
    data: dict[str, Any],
    settings: dict[str, Any],
    observed: Observed,
    device: torch.device,
    started: float,
    stop: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The provenance of a run that began at `started` (`time.perf_counter`) and ended as `stop` reports."""
    return {
        "model": model,
        "data": data,
        "settings": settings,
        "stop": stop,
        # The model's own way to run stacked experts; scoring runs them grouped, where each expert can be observed.
        "experts_implementation": observed.experts_implementation,
        "backend": ops.STATUS.backend(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": dict(versions()),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 3),
    }


def assemble(
    found: Discovery,
    observed: Observed,
    totals: Totals,
    norms: baselines.WeightNorms,
    values: list[float],
    ids: list[int],
    batches: list[int],
    provenance: dict[str, Any],
) -> Scores:
    """Split the layers into scored and unscored by what their totals hold."""
    modules, few_token_modules = list[ScoredModule](), list[ScoredModule]()
    kept, few, positions = list[int](), list[int](), list[int]()
    unscored = list(found.unscored)
    probed = provenance["settings"]["baseline"] == "probe"
    counts = totals.sum_samples()
    for index, (layer, norm, value) in enumerate(zip(found.layers, norms.values, values, strict=True)):
        tokens = counts.tokens[index]
        reason, detail = observed.unassigned.get(layer.name, ""), ""
        if not reason and not probed:
            reason = norms.failures.get(layer.name, "")
        if not reason and layer.adapter.routed and tokens < MIN_EXPERT_TOKENS:
            reason, detail = FEW_ROUTED, few_routed_detail(tokens)
        if not reason and counts.seen[index] == 0:
            reason = "never called in the forward, or only with masked tokens"
        elif not reason and tokens == 0:
            zero, nonfinite = counts.skipped_zero[index], counts.skipped_nonfinite[index]
            reason = f"no usable token: {zero:.0f} zero inputs, {nonfinite:.0f} non-finite"
        elif not reason and not (value > 0 and np.isfinite(value)):
            reason = norms.failures.get(layer.name, f"its weight is all zero or not finite (baseline {value:g})")
        if reason:
            unscored.append(UnscoredModule(layer.name, type(layer.module).__name__, reason, detail))
            if reason != FEW_ROUTED or not (value > 0 and np.isfinite(value)):
                continue
        has_few = reason == FEW_ROUTED
        if has_few:
            positions.append(len(kept) + len(few))
        (few if has_few else kept).append(index)
        (few_token_modules if has_few else modules).append(_scored(layer, norm, value, probed))
    if not kept:
        if not counts.seen.any() and not observed.unassigned:
            step = provenance["settings"]["token_step"]
            if step > 1:
                raise InputError(
                    f"no token counts: `token_step`={step} reads one token in {step}, and none of those counts; lower "
                    "it, or check `attention_mask`, `labels` and `mask`"
                )
            raise InputError(
                "no token counts: every token of `dataloader` is masked, or no linear layer was called; "
                "check `attention_mask`, `labels` and `mask`"
            )
        raise InputError(f"no module could be scored; `{unscored[-1].name}`: {unscored[-1].reason}")
    few_tokens = FewTokenModules(tuple(few_token_modules), totals.of_modules(few), tuple(positions))
    return Scores(
        tuple(modules),
        totals.of_modules(kept),
        np.array(ids, dtype=np.int64),
        np.array(batches, dtype=np.int64),
        tuple(unscored),
        provenance,
        few_tokens if few else None,
    )


def _scored(layer: LinearLayer, norm: float, value: float, probed: bool) -> ScoredModule:
    return ScoredModule(
        layer.name,
        layer.type,
        layer.layer,
        layer.in_features,
        layer.out_features,
        value,
        norm if math.isfinite(norm) else None,
        layer.target,
        kind=layer.adapter.kind,
        baseline_from="probe" if probed else layer.adapter.weights,
    )


def warn_about(scores: Scores, observed: Observed) -> None:
    """One warning per thing the user should know about the result."""
    fast = scores.provenance.get("fast")
    if fast is not None and fast["reason"] is not None:
        effect = f"speeds up {fast['blocks']} blocks" if fast["blocks"] else "has no effect"
        warn(f"`fast=True` {effect}: {fast['reason']}")
    per_sample = scores.totals.tokens.max(axis=0)
    step = scores.provenance["settings"]["token_step"]
    unread = int((per_sample == 0).sum()) if step > 1 else 0
    if unread:
        warn(
            f"`token_step`={step} read no token of {unread} of {len(per_sample)} samples, which have few that count; "
            "lower it"
        )
    # What a sample holds, not what was read of it.
    few = int((per_sample * step < FEW_TOKENS).sum()) - unread
    if few:
        warn(
            f"{few} of {len(per_sample)} samples have fewer than {FEW_TOKENS} counted tokens; "
            "use longer samples, or more of them"
        )
    nonfinite = scores.totals.skipped_nonfinite.sum(axis=1)
    if nonfinite.any():
        worst = int(nonfinite.argmax())
        warn(
            f"{int(nonfinite.sum())} token features are NaN or infinite and were left out, most in "
            f"`{scores.modules[worst].name}` ({int(nonfinite[worst])})"
        )
    zero = scores.totals.skipped_zero.sum(axis=1)
    if zero.any() and scores.provenance["settings"]["compat"] is None:  # the script counts them as a gain of zero
        worst = int(zero.argmax())
        warn(
            f"{int(zero.sum())} token features have an input of zeros and were left out, most in "
            f"`{scores.modules[worst].name}` ({int(zero[worst])})"
        )
    few_routed = [item for item in scores.unscored if item.reason == FEW_ROUTED]
    if few_routed:
        scored = sum(module.kind == ExpertsAdapter.kind for module in scores.modules)
        warn(
            f"{len(few_routed)} expert projections of {len(few_routed) + scored} are not scored: fewer than "
            f"{MIN_EXPERT_TOKENS} tokens were routed to each; use more samples"
        )
    missing = [item for item in scores.unscored if item.wanted and item not in few_routed]
    if missing:
        names = ", ".join(f"`{item.name}` ({item.layer_class})" for item in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        warn(f"not scored: {names}{more}: {missing[0].reason}")
    if observed.unmasked and (scores.provenance["settings"]["mask"] != "all"):
        partly = sorted(observed.unmasked)
        logger.info(
            "all rows of %d modules count, because they are not the tokens of the mask: %s", len(partly), partly
        )
