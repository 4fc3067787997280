"""`score`: run a model over data and return its scores."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from plop_ext.arguments import check_flags, check_type, shown
from plop_ext.collecting.collector import Collector
from plop_ext.errors import InputError
from plop_ext.forwards.batch import input_device, length
from plop_ext.forwards.choose import choose_forwards
from plop_ext.forwards.rule import AUTO, Planned, choose
from plop_ext.layers import (
    at_rest,
    base_model,
    discover_whole,
    divided_over,
    held_here,
    runnable,
    stage_of,
    whole_size,
)
from plop_ext.layers.completeness import part_of_model
from plop_ext.preserve import evaluating, random_state
from plop_ext.progress import progress_bar
from plop_ext.provenance import describe_model
from plop_ext.score_data.settings import Settings
from plop_ext.scores import Scores
from plop_ext.scoring.assemble import assemble
from plop_ext.scoring.baseline import compute_baselines, frobenius_norms
from plop_ext.scoring.describe import check_data_info, describe_run, described_way
from plop_ext.scoring.extent import available_samples, extent
from plop_ext.scoring.inputs import take_batches, take_model
from plop_ext.scoring.journal import journalled_fast
from plop_ext.scoring.ranks import TIMEOUT, ranks_of
from plop_ext.scoring.run import run_batches
from plop_ext.scoring.stages import union_of_stages
from plop_ext.scoring.stopping import StopWatch
from plop_ext.scoring.warn_about import warn_about, warn_of_scope
from plop_ext.statistics import StopRule
from plop_ext.weight_formats import refuse_misread

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def score(
    model: nn.Module | str | os.PathLike[str],
    dataloader: Iterable[Any] | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_samples: int | str | None = "auto",
    stop: str | StopRule | None = "auto",
    mask: str = "attention",
    baseline: str = "frobenius",
    probes: int = 256,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    scope: str = "language",
    token_step: int = 1,
    fast: bool | str = "auto",
    graph: bool | str = "auto",
    exact: bool = False,
    seed: int = 0,
    compat: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    data_name: str | None = None,
    data_info: Mapping[str, Any] | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    process_group: ProcessGroup | str | None = "auto",
    data: str = "auto",
    timeout: float = TIMEOUT,
) -> Scores:
    r"""Measure the normalized feature norm (NFN) of every linear module on task data.

    \(NFN(W) = \mathrm{mean}_t (\lVert W z_t \rVert / \lVert z_t \rVert) / E_u \lVert W u \rVert\) with u uniform on
    the unit sphere (PLoP, arXiv 2506.20629). An NFN of 1 means that W responds to its inputs as to random vectors; a
    larger NFN means that W is aligned with its inputs. Scoring takes one forward per batch, without gradients and
    without a second matmul; the bias is not part of the feature. Model, hooks, training mode and random states are
    restored, also after an exception.

    Args:
        model: Any module with layers of the kinds in docs/layers.md: linear (plain, packed or quantized),
            convolutions, stacked experts. A `torch.compile`d model is scored eagerly. Wrappers (DDP, FSDP,
            activation checkpointing, LoRA adapters, a module around one model) have no part in the names, so that a
            placement fits the model with and without them; in a model with LoRA adapters, the base layers are scored.
            Weights that FSDP or ZeRO-3 shards are gathered one by one, and a model that tensor, expert or pipeline
            parallelism divides is scored as a whole (docs/distributed.md).
            A folder or name of a model is loaded as by `plop_ext.models.load_model`, with its tokenizer.
        dataloader: Batches; or rows of a data set, texts, or samples from `plop_ext.data.encode`, which are encoded
            and batched with their defaults; or the name of a data set, as for `plop_ext.data.load_rows`. A dict is
            passed as keywords, a tuple or list as arguments, a tensor as the only argument. Each row of `input_ids`
            is a sample; in a packed batch, each sequence (by `cu_seq_lens_q`, `seq_idx`, `position_ids` that restart
            at 0, or numbered segments in `attention_mask`, where the model's attention reads them). `sample_ids`
            [samples] in a dict become the ids of the samples, and are not passed to the model.
        tokenizer: Tokenizer of the model, if `dataloader` holds rows or texts and `model` is no name.
        max_samples: Stop after the batch that completes this many samples; None reads all. By default at most 128,
            and fewer once the stop rule is met.
        stop: `"settled"`: stop as soon as at least 4 samples were read and the three lowest types are the same in 99 %
            of the bootstrap resamples of the samples. A `StopRule` names another number of types, or single modules
            (from 64 samples on). The samples must come in random order, as from `plop_ext.data.batches`. None: do not
            stop early. The default is `"settled"` unless you give `max_samples` or `compat`, and then None.
        mask: Tokens that count. `"attention"`: those with `attention_mask` 1, or all tokens if there is no
            `attention_mask`; `"completion"`: of these, tokens whose `labels` are not -100; `"all"`: all tokens,
            including padding. In a model with encoder and decoder, the decoder's tokens count by
            `decoder_attention_mask`, or else by `decoder_input_ids` or `labels`, and `"completion"` concerns the
            decoder only: all tokens of the encoder that are no padding condition the completion, and count. Images
            and sound count without their padding.
        baseline: Gain on random inputs. `"frobenius"`: ||W||_F / sqrt(K), from the weight, without a forward, and for
            matrices with at most 128 outputs or inputs the exact mean; `"probe"`: measured on random inputs, as in the
            paper.
        probes: Number of random inputs per module for `"probe"`.
        include: Names, or ends of names from a dot on; only the modules with such a name are scored. All of them
            compete for LoRA. Default: all modules inside repeated blocks, of which those that cannot learn, or that
            are wiring of the model, do not compete (`Scores.no_place_by_type`).
        exclude: Names, or ends of names from a dot on; the modules with such a name are not scored.
        scope: Part of a multimodal model: `"language"`, `"vision"`, `"audio"` or `"all"`. The default keeps
            adapters off a vision tower. In a model without a language part, the default is the part that it has, and
            a warning is issued.
        token_step: Read every `token_step`-th position of the padded batch, from a first position that is drawn for
            each batch. Means stay unbiased; 8 saves most of the overhead, and the means of samples scatter slightly
            more. If a sample has fewer counted tokens in a row than `token_step`, such as a short completion, none of
            its tokens may be read; the sample then has no part in the means, and no score in `per_sample()`.
        fast: Run the blocks of Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 and Phi-3 on fused kernels, which also
            emit the sums of squares: scoring then costs less than the plain forward. The first batch checks the
            kernels against the model. Outputs differ in the last bit of a few elements, float32 scores in the sixth
            digit, 16-bit scores in the third or fourth. All other blocks are scored as with `fast=False`; with
            `fast=True`, a warning gives the reason. `"auto"` follows from model, device and settings by the rule in
            docs/fast.md: never in a run with a stop rule. A resumed run keeps the choice of its journal.
        graph: Replay forwards as CUDA graphs, for a model on one CUDA device. This is faster if launching kernels
            takes longer than running them: for short batches, or small models. The first batch of a kind runs eagerly,
            and all later ones are replayed. Batches of one kind have the same shapes and the same first token read,
            and all or none of them contain padding. Therefore limit the number of lengths
            (`plop_ext.data.batches(pad_to_multiple_of=...)`) and leave `token_step` at 1, or score many batches.
            Scores are bitwise identical to those without graphs. A forward that synchronizes, as every transformers
            model does under a user-defined `forward`, is scored eagerly; with `graph=True`, a warning gives the
            reason. `"auto"` captures short batches by the rule in docs/graphs.md: never in a run with a stop rule.
        exact: Give scores bitwise identical to those of eager hooks: never choose fused kernels by `"auto"`.
        seed: Seed of the probes and of the first token read.
        compat: `"paper-script"` reproduces the published script: padding counts, batch means are averaged without
            weights, heads are scored, only the last call of a module counts, names of types match as substrings, and
            the baseline is `"probe"`, with an error below that of the script, which draws a probe for each token.
        forward: Function `forward(model, batch)` that runs a batch. By default the model is called as described under
            `dataloader`.
        data_name: Name of the data for the provenance.
        data_info: Further facts about the data for the provenance, such as column, split and length, as plain JSON
            values. A hash of the inputs is added if all of them are on the CPU.
        journal: File to which the totals of each batch are appended. A killed run can continue from it.
        resume: Continue `journal` if it exists: its batches need no forward, and nothing counts twice. Data, order,
            batch size, model and settings must be the same.
        progress: Show a progress bar.
        process_group: Ranks that score together: each runs other batches, and all return the same scores, bitwise
            those of one process. By default those of torch.distributed, if it is initialized; all must call. None
            uses this process alone, as in `if rank == 0`.
        data: `"same"`: all ranks have the same batches, which are dealt to them. `"shard"`: each rank has other ones,
            with `sample_ids`; samples that a sampler repeats count once. By default the first batches decide.
        timeout: Seconds after which a rank that does not answer counts as lost, and the others end with its number. A
            rank that fails ends the others within a batch, unless the model itself communicates in its forward: then
            the launcher ends them.

    Returns:
        The scores; `Scores.place` turns them into a placement.

    Raises:
        InputError: If an argument is out of range, the data is empty or fully masked, or no module can be scored.
    """
    check_flags(exact=exact, resume=resume, progress=progress)
    check_ways(fast=fast, graph=graph)
    check_type((str, type(None)), "a name, or None", data_name=data_name)
    check_type((str, os.PathLike, type(None)), "the path of a file, or None", journal=journal)
    if forward is not None and not callable(forward):
        raise InputError(f"`forward` must be a function of a model and a batch, got {shown(forward)}")
    limit, rule = extent(max_samples, stop, compat)
    settings = Settings(
        mask=mask,
        baseline=baseline,
        probes=probes,
        include=include,
        exclude=exclude,
        scope=scope,
        max_samples=limit,
        token_step=token_step,
        seed=seed,
        compat=compat,
    )
    if fast is True and compat is not None:
        raise InputError(
            f"`fast` reads outputs together, and `compat`={compat!r} reads each separately; leave one of the two out"
        )
    if fast is True and exact:
        raise InputError("`fast` changes the last bits, which `exact` keeps; leave one of the two out")
    if resume and fast == AUTO and not exact:
        fast = journalled_fast(journal)
    described_data = check_data_info(data_info)
    with ranks_of(process_group, data, timeout) as ranks:
        ranks.check_settings({**settings.to_dict(), "stop": str(rule), "data": data, "exact": exact})
        model, tokenizer = take_model(model, tokenizer)
        given = take_batches(dataloader, tokenizer, mask, limit, seed, forward is not None, ranks.size > 1)
        model = runnable(model)
        refuse_misread(base_model(model))
        started = time.perf_counter()
        if rule is not None and hasattr(given, "in_random_order"):
            given = given.in_random_order(seed)
        progress = progress and ranks.leads

        with random_state(), evaluating(model), at_rest(model):
            ranks.settle(model)
            with ranks.forward():
                stage = stage_of(model)
                everything = compat is not None
                found = discover_whole(
                    model, stage, include=include, exclude=exclude, scope=scope, everything=everything
                )
                settings = replace(settings, scope=found.scope)
                held = held_here(found.layers)
                with progress_bar("reading weights", len(held), progress) as advance:
                    norms = frobenius_norms(held, advance)
                baselines = compute_baselines(held, norms, settings, progress)
                norms, baselines = union_of_stages(stage, found.layers, norms, baselines)
            warn_of_scope(scope, found.scope)
            ranks.check_alike(found.layers, norms, input_device(model))
            baselines = ranks.agree_on(baselines)
            collector = Collector(model, found.layers, last_call_only=compat is not None)
            way = choose(
                model,
                fast=fast,
                graph=False if graph == AUTO and ranks.size > 1 else graph,  # a graph changes no bit
                exact=exact or compat is not None,
                plain=forward is None,
                may_stop=rule is not None,
                planned=Planned(length(given), limit),
            )
            way = replace(way, fast=bool(ranks.agree_on([float(way.fast)])[0]))
            forwards = choose_forwards(model, forward, collector, fast=way.fast, graph=way.graph)
            watch = None if rule is None else StopWatch(rule, found.layers, baselines)
            described = describe_model(base_model(model) if stage is None else stage.whole)
            described |= whole_size(base_model(model))
            part = "" if stage is not None else part_of_model(model)
            if part:
                described["part"] = part
            identity = {
                "model": described,
                "data": data_name,
                **settings.to_dict(),
                "stop": str(rule),
                "fast": way.fast,
                "modules": [layer.name for layer in found.layers],
            }
            if (processes := divided_over(model)) > 1:  # their products are rounded in another order
                identity["tensor_parallel"] = processes
            written, known = (None, None) if journal is None else ranks.journal(journal, identity, baselines, resume)
            total = limit if limit is not None else length(given)
            with (
                written or nullcontext(),
                collector,
                forwards,
                progress_bar("scoring", total, progress) as advance,
            ):
                done = run_batches(
                    model,
                    given,
                    collector,
                    forwards,
                    settings,
                    ranks=ranks,
                    journal=written,
                    known=known,
                    watch=watch,
                    advance=lambda samples: advance(samples if limit is not None else 1),
                )
                report = forwards.report()
            report["forward"] = described_way(way, report)
        outcome = done.outcome(collector, norms, baselines)
        available = ranks.available(available_samples(given, limit, done.batches.count(done.batches[0])))
        ended = None if watch is None else watch.report(len(done.ids), available)
        described_data |= {"name": data_name, "hash": done.fingerprint}
        provenance = describe_run(described, described_data, settings, outcome, input_device(model), started, ended)
        scores = assemble(found, outcome, ranks.describe(provenance | report))
        warn_about(scores, outcome, asked_fast=fast is True)
    logger.info(
        "scored %d modules on %d samples, backend %s", len(scores.modules), len(done.ids), provenance["backend"]
    )
    return scores


def check_ways(**values: Any) -> None:
    """Check that arguments are True, False or "auto".

    Raises:
        InputError: If one is not; the message names it.
    """
    for name, value in values.items():
        if not isinstance(value, bool) and not (isinstance(value, str) and value == AUTO):
            raise InputError(f"`{name}` must be True, False or 'auto', got {shown(value)}")
