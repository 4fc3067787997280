"""Drives a model over data and returns its scores."""

from __future__ import annotations

import datetime
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from plop_ext import ops
from plop_ext.errors import InputError
from plop_ext.layers import Discovery, discover
from plop_ext.preserve import evaluating, random_state
from plop_ext.progress import progress_bar
from plop_ext.provenance import describe_model, versions
from plop_ext.scores import ScoredModule, Scores, UnscoredModule
from plop_ext.scoring import baseline as baselines
from plop_ext.scoring.arguments import available_samples, check_arguments, extent
from plop_ext.scoring.batch import default_forward, length
from plop_ext.scoring.collector import Collector
from plop_ext.scoring.journal import Journal
from plop_ext.scoring.run import run_batches
from plop_ext.scoring.stopping import StopWatch
from plop_ext.statistics import StopRule

logger = logging.getLogger(__name__)

FEW_TOKENS = 16


def score(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    max_samples: int | str | None = "auto",
    stop: str | StopRule | None = "auto",
    mask: str = "attention",
    baseline: str = "frobenius",
    probes: int = 256,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    token_step: int = 1,
    seed: int = 0,
    compat: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    data_name: str | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Scores:
    r"""Measure the normalized feature norm (NFN) of every linear module on task data.

    \(NFN(W) = \mathrm{mean}_t (\lVert W z_t \rVert / \lVert z_t \rVert) / E_u \lVert W u \rVert\) with u uniform on
    the unit sphere (PLoP, arXiv 2506.20629): 1 means the module sees its input as noise, larger means it is aligned
    with it. One forward per batch, no gradients, no second matmul; the bias is not part of the feature. Model, hooks,
    training mode and random states are left as found, also after an exception.

    Args:
        model: Any module made of `nn.Linear`. A `torch.compile`d model is scored eagerly.
        dataloader: Batches: a dict is passed as keywords, a tuple or list as arguments, a tensor as the only one. A
            dict may carry `sample_ids` [B], which is taken out.
        max_samples: Stop after the batch that completes this many samples; None reads all. By default at most 128,
            and fewer once the stop rule is satisfied.
        stop: `"settled"`: end as soon as the three lowest types are the same in 99 % of the draws of samples and at
            least 4 were seen; a `StopRule` watches another number of types, or single modules (from 64 samples on).
            The samples must come in random order (`plop_ext.data.batches` sees to that). None reads on. By default
            `"settled"` if `max_samples` is left at its default, else None.
        mask: `"attention"`: tokens with `attention_mask` 1 (all without one); `"completion"`: of these, tokens whose
            `labels` are not -100; `"all"`: padding too.
        baseline: `"frobenius"`: ||W||_F / sqrt(K), exact and free; `"probe"`: random inputs through the module.
        probes: Random inputs per module for `"probe"`.
        include: Score exactly the modules whose name ends with one of these; default: all inside repeated blocks.
        exclude: Leave out the modules whose name ends with one of these.
        token_step: Read every `token_step`-th token, from a random first one per batch. 8 costs no accuracy on
            ordinary text and saves most of the overhead.
        seed: Seed of the probes and of the first token read.
        compat: `"paper-script"` reproduces the published script: padding counts, batch means are averaged without
            weights, heads are scored, only the last call of a module counts, types match as substrings, probe
            baseline.
        forward: How to run a batch, `forward(model, batch)`; default as described under `dataloader`.
        data_name: Name of the data for the provenance.
        journal: File to write each batch's totals to as they come. A run that was killed continues from it.
        resume: Continue `journal` if it is there: batches in it need no forward, and nothing counts twice. Data,
            order, batch size, model and settings must be the same.
        progress: Show a progress bar.

    Returns:
        The scores; `Scores.place` turns them into a placement.

    Raises:
        InputError: If an argument is out of range, the data is empty or fully masked, or no module can be scored.
    """
    limit, rule = extent(max_samples, stop, compat)
    check_arguments(mask, baseline, compat, limit, token_step, probes)
    if compat == "paper-script":
        mask, baseline, token_step = "all", "probe", 1
    model = getattr(model, "_orig_mod", model)
    found = discover(model, include=include, exclude=exclude, everything=compat is not None)
    started = time.perf_counter()
    settings = {
        "mask": mask,
        "baseline": baseline,
        "probes": probes if baseline == "probe" else None,
        "include": None if include is None else list(include),
        "exclude": list(exclude),
        "max_samples": limit,
        "token_step": token_step,
        "seed": seed,
        "compat": compat,
    }
    if rule is not None and hasattr(dataloader, "in_random_order"):
        dataloader = dataloader.in_random_order(seed)

    with random_state(), evaluating(model):
        norms = baselines.frobenius_norms(found.layers)
        if baseline == "probe":
            values = baselines.probe_baselines(found.layers, probes=probes, seed=seed)
        else:
            values = baselines.frobenius_baselines(found.layers, norms)
        collector = Collector(model, found.layers, last_call_only=compat is not None)
        watch = None if rule is None else StopWatch(rule, found.layers, values)
        described = describe_model(model)
        identity = {"model": described, "data": data_name, **settings, "stop": str(rule)}
        identity["modules"] = [layer.name for layer in found.layers]
        record = nullcontext() if journal is None else Journal(journal, identity, values, resume)
        total = limit if limit is not None else length(dataloader)
        with record as written, collector, progress_bar("scoring", total, progress) as advance:
            done = run_batches(
                model,
                dataloader,
                collector,
                forward or default_forward(model, [layer.module for layer in found.layers]),
                mask=mask,
                token_step=token_step,
                seed=seed,
                max_samples=limit,
                journal=written,
                watch=watch,
                advance=lambda samples: advance(samples if limit is not None else 1),
            )
    if not done.ids:
        raise InputError("`dataloader` is empty; give it at least one batch")
    totals = np.concatenate(done.tables, axis=1)
    available = available_samples(dataloader, limit, done.batches.count(done.batches[0]))

    device = found.layers[0].adapter.weight_rows(found.layers[0].module).device
    provenance = {
        "model": described,
        "data": {"name": data_name, "samples": len(done.ids)},
        "settings": settings,
        "stop": None if watch is None else watch.report(len(done.ids), available),
        "backend": ops.STATUS.backend(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": dict(versions()),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - started, 3),
    }
    scores = _assemble(found, collector, totals, norms, values, done.ids, done.batches, provenance)
    _warn(scores, collector)
    logger.info(
        "scored %d modules on %d samples, backend %s", len(scores.modules), len(done.ids), provenance["backend"]
    )
    return scores


def find_plop_targets(
    model: nn.Module, dataloader: Iterable[Any], types: int | str | None = None, **score_kwargs: Any
) -> dict[str, Any]:
    """Score `model` and return keyword arguments for `LoraConfig(**targets)`: the `types` lowest module types.

    Args:
        model: As for `score`.
        dataloader: As for `score`.
        types: How many module types (default 3), or `"auto"`, as for `Scores.place`.
        **score_kwargs: Anything else `score` takes.

    Example:
        >>> targets = plop_ext.find_plop_targets(model, dataloader, types=3)
        >>> model = peft.get_peft_model(model, peft.LoraConfig(r=16, **targets))
    """
    return score(model, dataloader, **score_kwargs).place(types=types).targets()


def _assemble(
    found: Discovery,
    collector: Collector,
    totals: np.ndarray[Any, Any],
    norms: list[float],
    values: list[float],
    ids: list[int],
    batches: list[int],
    provenance: dict[str, Any],
) -> Scores:
    """Split the layers into scored and unscored by what their totals hold."""
    modules, kept = [], []
    unscored = [UnscoredModule(item.name, item.layer_class, item.reason) for item in found.unscored]
    for index, (layer, norm, value) in enumerate(zip(found.layers, norms, values, strict=True)):
        seen = totals[index].sum(axis=0)
        reason = collector.unassigned.get(layer.name, "")
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
            ScoredModule(layer.name, layer.type, layer.layer, layer.in_features, layer.out_features, value, norm)
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


def _warn(scores: Scores, collector: Collector) -> None:
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
    missing = [item for item in scores.unscored if "outside the repeated" not in item.reason]
    missing = [item for item in missing if item.reason not in ("excluded", "not included")]
    if missing:
        names = ", ".join(f"`{item.name}` ({item.layer_class})" for item in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        warnings.warn(f"not scored: {names}{more}: {missing[0].reason}", stacklevel=3)
    if collector.unmasked and (scores.provenance["settings"]["mask"] != "all"):
        partly = sorted(collector.unmasked)
        logger.info(
            "all rows of %d modules count, because they are not the tokens of the mask: %s", len(partly), partly
        )
