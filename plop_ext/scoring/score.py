"""Drives a model over data and returns its scores."""

from __future__ import annotations

import datetime
import logging
import math
import platform
import random
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from plop_ext import ops
from plop_ext.errors import InputError
from plop_ext.layers import Discovery, discover
from plop_ext.layers.experts import ExpertsAdapter
from plop_ext.preserve import evaluating, random_state
from plop_ext.progress import progress_bar
from plop_ext.provenance import describe_model, versions
from plop_ext.scores import ScoredModule, Scores, UnscoredModule
from plop_ext.scoring import baseline as baselines
from plop_ext.scoring.batch import (
    batch_size,
    batch_to_device,
    default_forward,
    input_device,
    length,
    take_sample_ids,
    token_mask,
)
from plop_ext.scoring.collector import Collector

logger = logging.getLogger(__name__)

MASKS = ("attention", "completion", "all")
COMPATS = (None, "paper-script")
DEFAULT_SAMPLES = 16
FEW_TOKENS = 16
# An expert that saw fewer is left out: its mean would be mostly noise.
MIN_EXPERT_TOKENS = 16
FEW_ROUTED = "too few tokens were routed to it"


def score(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    max_samples: int | None = DEFAULT_SAMPLES,
    mask: str = "attention",
    baseline: str = "frobenius",
    probes: int = 256,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    scope: str = "language",
    token_step: int = 1,
    seed: int = 0,
    compat: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    data_name: str | None = None,
    progress: bool = True,
) -> Scores:
    r"""Measure the normalized feature norm (NFN) of every linear module on task data.

    \(NFN(W) = \mathrm{mean}_t (\lVert W z_t \rVert / \lVert z_t \rVert) / E_u \lVert W u \rVert\) with u uniform on
    the unit sphere (PLoP, arXiv 2506.20629): 1 means the module sees its input as noise, larger means it is aligned
    with it. One forward per batch, no gradients, no second matmul; the bias is not part of the feature. Model, hooks,
    training mode and random states are left as found, also after an exception.

    Args:
        model: Any module made of linear layers: plain, fused, quantized, convolutions, fused experts (docs/layers.md).
            A `torch.compile`d model is scored eagerly; of one with LoRA adapters the base layers are scored.
        dataloader: Batches: a dict is passed as keywords, a tuple or list as arguments, a tensor as the only one. A
            dict may carry `sample_ids` [B], which is taken out.
        max_samples: Stop after the batch that completes this many samples; None reads all. 16 settle the order of
            types; single modules need 64 or more.
        mask: `"attention"`: tokens with `attention_mask` 1 (all without one); `"completion"`: of these, tokens whose
            `labels` are not -100; `"all"`: padding too.
        baseline: `"frobenius"`: ||W||_F / sqrt(K), exact and free; `"probe"`: random inputs through the module.
        probes: Random inputs per module for `"probe"`.
        include: Score exactly the modules whose name ends with one of these; default: all inside repeated blocks.
        exclude: Leave out the modules whose name ends with one of these.
        scope: Part of a multimodal model: `"language"`, `"vision"`, `"audio"` or `"all"`. The default keeps
            adapters off a vision tower.
        token_step: Read every `token_step`-th token, from a random first one per batch. 8 costs no accuracy on
            ordinary text and saves most of the overhead.
        seed: Seed of the probes and of the first token read.
        compat: `"paper-script"` reproduces the published script: padding counts, batch means are averaged without
            weights, heads are scored, only the last call of a module counts, types match as substrings, probe
            baseline.
        forward: How to run a batch, `forward(model, batch)`; default as described under `dataloader`.
        data_name: Name of the data for the provenance.
        progress: Show a progress bar.

    Returns:
        The scores; `Scores.place` turns them into a placement.

    Raises:
        InputError: If an argument is out of range, the data is empty or fully masked, or no module can be scored.
    """
    _check_arguments(mask, baseline, compat, max_samples, token_step, probes)
    if compat == "paper-script":
        mask, baseline, token_step = "all", "probe", 1
    model = getattr(model, "_orig_mod", model)
    found = discover(model, include=include, exclude=exclude, scope=scope, everything=compat is not None)
    started = time.perf_counter()

    ids: list[int] = []
    batches: list[int] = []
    phases = random.Random(seed)
    with random_state(), evaluating(model):
        norms = baselines.frobenius_norms(found.layers)
        if baseline == "probe":
            values = baselines.probe_baselines(found.layers, probes=probes, seed=seed)
        else:
            values = baselines.frobenius_baselines(found.layers, norms.values)
        collector = Collector(model, found.layers, last_call_only=compat is not None)
        run = forward or default_forward(model, [layer.module for layer in found.layers])
        total = max_samples if max_samples is not None else length(dataloader)
        with collector, progress_bar("scoring", total, progress) as advance:
            for number, batch in enumerate(dataloader):
                batch, sample_ids = take_sample_ids(batch)
                counted = token_mask(batch, mask)
                size = batch_size(batch)
                batch = batch_to_device(batch, input_device(model))
                collector.begin(size, counted, step=token_step, phase=phases.randrange(token_step))
                run(model, batch)
                collector.end()
                ids += sample_ids if sample_ids is not None else range(len(ids), len(ids) + size)
                batches += [number] * size
                advance(size if max_samples is not None else 1)
                if max_samples is not None and len(ids) >= max_samples:
                    break
        totals = collector.totals().numpy()
    if not ids:
        raise InputError("`dataloader` is empty; give it at least one batch")

    device = input_device(model)
    provenance = {
        "model": describe_model(model),
        "data": {"name": data_name, "samples": len(ids)},
        "settings": {
            "mask": mask,
            "baseline": baseline,
            "probes": probes if baseline == "probe" else None,
            "include": None if include is None else list(include),
            "exclude": list(exclude),
            "scope": scope,
            "max_samples": max_samples,
            "token_step": token_step,
            "seed": seed,
            "compat": compat,
        },
        # The model's own way to run fused experts; scoring runs them grouped, where each expert can be observed.
        "experts_implementation": collector.experts_implementation,
        "backend": ops.STATUS.backend(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": versions(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 3),
    }
    scores = _assemble(found, collector, totals, norms, values, ids, batches, provenance)
    _warn(
        scores,
        collector,
        {item.name for item in found.unscored if item.wanted} | {layer.name for layer in found.layers},
    )
    logger.info("scored %d modules on %d samples, backend %s", len(scores.modules), len(ids), provenance["backend"])
    return scores


def find_plop_targets(
    model: nn.Module, dataloader: Iterable[Any], types: int = 3, **score_kwargs: Any
) -> dict[str, Any]:
    """Score `model` and return keyword arguments for `LoraConfig(**targets)`: the `types` lowest module types.

    Args:
        model: As for `score`.
        dataloader: As for `score`.
        types: How many module types.
        **score_kwargs: Anything else `score` takes.

    Example:
        >>> targets = plop_ext.find_plop_targets(model, dataloader)
        >>> model = peft.get_peft_model(model, peft.LoraConfig(r=16, **targets))
    """
    return score(model, dataloader, **score_kwargs).place(types=types).targets()


def _check_arguments(
    mask: str, baseline: str, compat: str | None, max_samples: int | None, token_step: int, probes: int
) -> None:
    if mask not in MASKS:
        raise InputError(f"`mask` must be one of {', '.join(MASKS)}, got {mask!r}")
    if baseline not in baselines.BASELINES:
        raise InputError(f"`baseline` must be one of {', '.join(baselines.BASELINES)}, got {baseline!r}")
    if compat not in COMPATS:
        raise InputError(f"`compat` must be None or 'paper-script', got {compat!r}")
    for name, value in (("max_samples", max_samples), ("token_step", token_step), ("probes", probes)):
        if value is not None and value < 1:
            raise InputError(f"`{name}` must be at least 1, got {value}")


def _assemble(
    found: Discovery,
    collector: Collector,
    totals: np.ndarray[Any, Any],
    norms: baselines.WeightNorms,
    values: list[float],
    ids: list[int],
    batches: list[int],
    provenance: dict[str, Any],
) -> Scores:
    """Split the layers into scored and unscored by what their totals hold."""
    modules, kept = [], []
    unscored = [UnscoredModule(item.name, item.layer_class, item.reason) for item in found.unscored]
    probed = provenance["settings"]["baseline"] == "probe"
    for index, (layer, norm, value) in enumerate(zip(found.layers, norms.values, values, strict=True)):
        seen = totals[index].sum(axis=0)
        reason = collector.unassigned.get(layer.name, "")
        if not reason and not probed:
            reason = norms.failures.get(layer.name, "")
        if not reason and isinstance(layer.adapter, ExpertsAdapter) and seen[2] < MIN_EXPERT_TOKENS:
            reason = f"{FEW_ROUTED}: {seen[2]:.0f} of {MIN_EXPERT_TOKENS}"
        if not reason and seen[2:].sum() == 0:
            reason = "never called in the forward, or only with masked tokens"
        elif not reason and seen[2] == 0:
            reason = f"no usable token: {seen[3]:.0f} zero inputs, {seen[4]:.0f} non-finite"
        elif not reason and not (value > 0 and np.isfinite(value)):
            reason = f"its weight is all zero or not finite (baseline {value:g})"
        if reason:
            unscored.append(UnscoredModule(layer.name, type(layer.module).__name__, reason))
            continue
        kept.append(index)
        modules.append(
            ScoredModule(
                layer.name,
                layer.type,
                layer.layer,
                layer.in_features,
                layer.out_features,
                value,
                norm if math.isfinite(norm) else None,
                kind=layer.adapter.kind,
                baseline_from="probe" if probed else layer.adapter.weights,
                target=layer.target.name,
                target_parameter=layer.target.parameter,
                target_size=layer.target.size,
                target_shape=layer.target.shape,
                refused=layer.target.refused,
            )
        )
    if not kept:
        if (totals[:, :, 2:].sum() == 0) and not collector.unassigned:
            raise InputError(
                "no token counts: every token of `dataloader` is masked, or no linear layer was called; "
                "check `attention_mask`, `labels` and `mask`"
            )
        raise InputError(f"no module could be scored; `{unscored[-1].name}`: {unscored[-1].reason}")
    return Scores(
        tuple(modules),
        np.ascontiguousarray(totals[kept]),
        np.array(ids, dtype=np.int64),
        np.array(batches, dtype=np.int64),
        tuple(unscored),
        provenance,
    )


def _warn(scores: Scores, collector: Collector, wanted: Collection[str]) -> None:
    """One warning per thing the user should know about the result."""
    per_sample = scores.totals[:, :, 2].max(axis=0)
    few = int((per_sample < FEW_TOKENS).sum())
    if few:
        warnings.warn(
            f"{few} of {len(per_sample)} samples have fewer than {FEW_TOKENS} counted tokens; "
            "use longer samples, or more of them",
            stacklevel=3,
        )
    nonfinite = scores.totals[:, :, 4].sum(axis=1)
    if nonfinite.any():
        worst = int(nonfinite.argmax())
        warnings.warn(
            f"{int(nonfinite.sum())} token features are NaN or infinite and were left out, most in "
            f"`{scores.modules[worst].name}` ({int(nonfinite[worst])})",
            stacklevel=3,
        )
    few_routed = [item for item in scores.unscored if item.reason.startswith(FEW_ROUTED)]
    if few_routed:
        scored = sum(module.kind == ExpertsAdapter.kind for module in scores.modules)
        warnings.warn(
            f"{len(few_routed)} expert projections of {len(few_routed) + scored} are not scored: fewer than "
            f"{MIN_EXPERT_TOKENS} tokens were routed to each; use more samples",
            stacklevel=3,
        )
    missing = [item for item in scores.unscored if item.name in wanted and item not in few_routed]
    if missing:
        names = ", ".join(f"`{item.name}` ({item.layer_class})" for item in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        warnings.warn(f"not scored: {names}{more}: {missing[0].reason}", stacklevel=3)
    if collector.unmasked and (scores.provenance["settings"]["mask"] != "all"):
        partly = sorted(collector.unmasked)
        logger.info(
            "all rows of %d modules count, because they are not the tokens of the mask: %s", len(partly), partly
        )
