"""The scores of a run from its totals: which modules are scored, which are not, and why."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from plop_ext.errors import InputError
from plop_ext.layers import Discovery, LinearLayer, plain_class
from plop_ext.layers.streams import AUDIO, VISION
from plop_ext.score_data import FewTokenModules, ScoredModule
from plop_ext.score_data.modules import FEW_ROUTED, MIN_EXPERT_TOKENS, few_routed_detail
from plop_ext.scores import Scores
from plop_ext.scoring.nonfinite import find_nonfinite
from plop_ext.scoring.outcome import Outcome
from plop_ext.unscored import UnscoredModule

# What the rows of a stream come from, and the fields of a batch that hold it.
_OTHER_STREAMS = {VISION: ("image", "`pixel_values`"), AUDIO: ("sound", "`input_features` or `input_values`")}


def assemble(found: Discovery, outcome: Outcome, provenance: dict[str, Any]) -> Scores:
    """Make the scores: split the layers into scored and unscored ones by their totals."""
    totals, norms = outcome.totals, outcome.norms
    modules, few_token_modules = list[ScoredModule](), list[ScoredModule]()
    kept, few, positions = list[int](), list[int](), list[int]()
    unscored = list(found.unscored)
    probed = provenance["settings"]["baseline"] == "probe"
    counts = totals.sum_samples()
    seen = counts.seen
    for index, (layer, norm, value) in enumerate(zip(found.layers, norms.values, outcome.baselines, strict=True)):
        tokens = counts.tokens[index]
        reason, detail = outcome.unassigned.get(layer.name), ""
        if not reason and not probed:
            reason = norms.failures.get(layer.name)
        if not reason and layer.adapter.routed and tokens < MIN_EXPERT_TOKENS:
            reason, detail = FEW_ROUTED, few_routed_detail(tokens)
        if not reason and seen[index] == 0:
            reason = "never called in the forward, or only with masked tokens"
        elif not reason and tokens == 0:
            zero, nonfinite = counts.skipped_zero[index], counts.skipped_nonfinite[index]
            reason = f"no usable token: {zero:.0f} zero inputs, {nonfinite:.0f} non-finite"
        elif not reason and not (value > 0 and np.isfinite(value)):
            reason = norms.failures.get(layer.name, f"its weight is all zero or not finite (baseline {value:g})")
        if reason:
            unscored.append(UnscoredModule(layer.name, plain_class(layer.module).__name__, reason, detail))
            if reason != FEW_ROUTED or not (value > 0 and np.isfinite(value)):
                continue
        has_few = reason == FEW_ROUTED
        if has_few:
            positions.append(len(kept) + len(few))
        (few if has_few else kept).append(index)
        (few_token_modules if has_few else modules).append(_scored(layer, norm, value, probed))
    broken = find_nonfinite(found.layers, outcome)
    if not kept:
        if broken is not None:
            raise InputError(f"no module can be scored: {broken}")
        if not seen.any() and not outcome.unassigned:
            step = provenance["settings"]["token_step"]
            if step > 1:
                raise InputError(
                    f"no token counts: `token_step`={step} reads one token in {step}, and none of these counts; "
                    "lower `token_step`, or check `attention_mask`, `labels` and `mask`"
                )
            for stream, (what, fields) in _OTHER_STREAMS.items():
                if all(layer.stream == stream for layer in found.layers):
                    raise InputError(
                        f"no {what} reaches a layer to score: the batches of `dataloader` hold none, or padding only; "
                        f"pass {fields}, as the model's processor returns them"
                    )
            raise InputError(
                "no token counts: every token of `dataloader` is masked, or no linear layer was called; "
                "check `attention_mask`, `labels` and `mask`"
            )
        raise InputError(f"no module could be scored; `{unscored[-1].name}`: {unscored[-1].reason}")
    if all(module.no_place for module in modules):
        # As in `discover`: if PEFT can adapt none of what was scored, it competes, for another trainer.
        modules = [
            replace(module, no_place="") if module.no_place == module.target.refused else module for module in modules
        ]
    if all(module.no_place for module in modules):
        raise InputError(
            f"no candidate for LoRA could be scored; `{modules[0].name}` is none, because {modules[0].no_place}; "
            "name in `include` what to score"
        )
    few_tokens = FewTokenModules(tuple(few_token_modules), totals.of_modules(few), tuple(positions))
    return Scores(
        tuple(modules),
        totals.of_modules(kept),
        np.array(outcome.ids, dtype=np.int64),
        np.array(outcome.batches, dtype=np.int64),
        tuple(unscored),
        provenance | {"nonfinite": broken},
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
        no_place=layer.no_place,
    )
