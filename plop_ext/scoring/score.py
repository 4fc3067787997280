"""Drives a model over data and returns its scores."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from plop_ext.errors import InputError
from plop_ext.layers import discover
from plop_ext.preserve import evaluating, random_state
from plop_ext.progress import progress_bar
from plop_ext.provenance import describe_model
from plop_ext.scores import Scores
from plop_ext.scoring import baseline as baselines
from plop_ext.scoring.assemble import assemble, describe_run, warn
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
    check_arguments(mask, baseline, compat, max_samples, token_step, probes)
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

    settings = {
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
    }
    provenance = describe_run(
        describe_model(model), data_name, len(ids), settings, collector, input_device(model), started
    )
    scores = assemble(found, collector, totals, norms, values, ids, batches, provenance)
    warn(
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


def check_arguments(
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
