"""`score_streaming`: score a model that is never completely in memory."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from plop_ext import memory, quantities
from plop_ext.arguments import check_flags, check_type
from plop_ext.errors import InputError
from plop_ext.forwards.batch import default_forward
from plop_ext.models.checkpoint import Checkpoint
from plop_ext.models.code import ask_for_trust
from plop_ext.models.device import parse_device, parse_dtype
from plop_ext.models.explained import quiet
from plop_ext.models.source import Source, find
from plop_ext.preserve import random_state
from plop_ext.provenance import describe_model, versions
from plop_ext.read_ahead import reading_ahead
from plop_ext.score_data.settings import Settings
from plop_ext.scores import Scores
from plop_ext.scoring.assemble import assemble
from plop_ext.scoring.describe import describe_run
from plop_ext.scoring.digest import data_hash, digest
from plop_ext.scoring.inputs import take_batches
from plop_ext.scoring.warn_about import warn_about, warn_of_scope
from plop_ext.streaming import plan, skeleton
from plop_ext.streaming.run import Stream, collect_batches, join, streaming
from plop_ext.streaming.state import State
from plop_ext.streaming.store import Store
from plop_ext.streaming.weights import Weights, one_thread
from plop_ext.streams.batch import StreamReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# All samples go through every block, so a streamed run cannot stop early, as `score` does.
DEFAULT_SAMPLES = 16
# Share of the free memory that a run without a budget may use.
_SHARE = 0.8


def score_streaming(
    name_or_path: str,
    dataloader: Iterable[Any] | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_samples: int | None = DEFAULT_SAMPLES,
    mask: str = "attention",
    baseline: str = "frobenius",
    probes: int = 256,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    scope: str = "language",
    token_step: int = 1,
    seed: int = 0,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    memory_budget: int | str | None = None,
    state: str | Path | None = None,
    resume: bool = False,
    data_name: str | None = None,
    progress: bool = True,
) -> Scores:
    """Score a model that fits neither the device nor the RAM, one block at a time, as `plop_ext.score` would.

    All batches go through the embedding, then through block 0, block 1, ..., while the next block's weights are being
    read from the files. The run holds two blocks, the activations of one batch and the totals in memory; the hidden
    states between blocks are kept on the device, in RAM or on disk. The run ends after the last block that holds a
    layer to score; the weights of the output head are never read. The inputs of all batches are kept in RAM.

    Args:
        name_or_path: Model folder with safetensors files, a name on the hub (which is downloaded), or `"plop-tiny"`.
        dataloader: As for `score`.
        tokenizer: As for `score`; rows and texts need it.
        max_samples: Stop reading after the batch that completes this many samples; None reads all. 16 samples suffice
            for a stable order of types; an order of single modules needs 64 or more.
        mask: As for `score`.
        baseline: As for `score`.
        probes: As for `score`.
        include: As for `score`. All layers to score must be in one list of blocks.
        exclude: As for `score`.
        scope: As for `score`.
        token_step: As for `score`.
        seed: As for `score`.
        dtype: Floating-point type of the weights: `"auto"` for the type in the checkpoint, a `torch.dtype`, or its
            name.
        device: Device of the run. Default CUDA if available, otherwise the CPU.
        attn_implementation: Attention implementation, as for transformers' `from_pretrained`. Default the model's own.
        trust_remote_code: Run code that comes with the checkpoint; read it first.
        memory_budget: Limit on the memory of the device and on the RAM of the process, in bytes or as a size such as
            `"6GiB"`. Default: 80 % of the free memory. A run that needs more is refused. Lower the budget to leave
            memory to other processes: hidden states then go to RAM or disk.
        state: Folder for the state of the run, from which a killed run can be resumed. The folder remains after a
            complete run, so that `resume` can return scores that were not saved; remove it once the scores are saved.
            Default: no state is kept.
        resume: Continue the run of `state` after its last finished block.
        data_name: Name of the data for the provenance.
        progress: Show a progress bar.

    Returns:
        The scores. `provenance["streaming"]` has the plan, the measured peaks and the bytes read.

    Raises:
        InputError: If a file is missing, truncated or damaged, if the model cannot be streamed, if the budget is too
            small, or if an argument is out of range.
        SetupError: If the version of transformers is not supported, or the hub cannot be reached.

    Example:
        >>> scores = plop_ext.score_streaming("plop-tiny", dataloader, memory_budget="4GiB", device="cpu")
        >>> scores.provenance["streaming"]["blocks"]
        8
    """
    settings = Settings(
        mask=mask,
        baseline=baseline,
        probes=probes,
        include=include,
        exclude=exclude,
        scope=scope,
        max_samples=max_samples,
        token_step=token_step,
        seed=seed,
    )
    check_type((str, os.PathLike), "the name or folder of a model", name_or_path=name_or_path)
    check_type((str, os.PathLike, type(None)), "the path of a folder, or None", state=state)
    check_type((str, type(None)), "a name, or None", data_name=data_name, attn_implementation=attn_implementation)
    check_flags(resume=resume, progress=progress, trust_remote_code=trust_remote_code)
    name_or_path = os.fspath(name_or_path)
    if resume and state is None:
        raise InputError("`resume` needs `state`, the folder that the killed run wrote")
    started = time.perf_counter()
    budget = None if memory_budget is None else quantities.size(memory_budget, "memory_budget")
    chosen = run_device(device)
    source = streamed_source(name_or_path, code=trust_remote_code)
    # A budget limits the RAM of the process, of which the buffers of these reads would be a part.
    with nullcontext() if budget is not None else reading_ahead(source.folder):
        trust = ask_for_trust(name_or_path, source.folder, trust_remote_code)
        checkpoint = Checkpoint(source.folder)
        model = skeleton.build(
            source,
            checkpoint,
            trust=trust,
            dtype=parse_dtype(dtype),
            device=chosen,
            attn_implementation=attn_implementation,
            include=include,
            exclude=exclude,
            scope=scope,
        )
        warn_of_scope(scope, model.found.scope)
        settings = replace(settings, scope=model.found.scope)
        given = take_batches(dataloader, tokenizer, mask, max_samples, seed, own=False)
        data = collect_batches(given, settings, StreamReader(model.model, settings.mask))
        weights = Weights(model, checkpoint)
    figures = plan.make(model, weights, [batch.extent for batch in data.batches], chosen)
    _reset_peaks(chosen, model.dtype)
    rooms = _rooms(figures, chosen, budget)

    fingerprint = data_hash([digest(batch.inputs) for batch in data.batches])
    identity = {
        "checkpoint": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in checkpoint.files},
        "data": fingerprint,
        "settings": settings.to_dict(),
        "dtype": str(model.dtype),
        "device": chosen.type,
        "versions": dict(versions()),
    }
    kept = None if state is None else State(Path(state), identity)
    finished = 0 if kept is None else kept.open(resume)
    store = Store(chosen, *rooms)
    with random_state(), torch.no_grad(), one_thread(), quiet():
        stream = Stream(model, weights, data.batches, settings, chosen, store, kept)
        with streaming(stream, store):
            results = stream.run(default_forward(model.model, []), finished, progress)
    peaks = _peaks(chosen)
    outcome = join(results, data)
    described = {"name": data_name, "hash": fingerprint}
    provenance = describe_run(describe_model(model.model), described, settings, outcome, chosen, started)
    provenance["forward"] = {"hooks": True, "fast": False, "graph": False, "why": "streamed, block by block"}
    provenance["streaming"] = {
        **vars(figures),
        "memory_budget": budget,
        **peaks,
        "hidden_kept": store.most,
        "bytes_read": stream.loader.reader.bytes_read,
        "read_seconds": round(stream.loader.reader.seconds, 3),
        "resumed_at": finished,
    }
    scores = assemble(model.found, outcome, provenance)
    warn_about(scores, outcome)
    used = {name: peak or 0 for name, peak in peaks.items()}
    if budget is not None and max(used.values()) > budget:
        logger.warning(
            "the memory budget of %s was exceeded: the peaks are %s of RAM and %s on the device",
            memory.format_size(budget),
            memory.format_size(used["peak_rss"]),
            memory.format_size(used["peak_device"]),
        )
    logger.info("scored %d modules on %d samples, block by block", len(scores.modules), len(data.ids))
    return scores


def run_device(device: str | torch.device | None) -> torch.device:
    """Return the device of an argument, with its index."""
    chosen = parse_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def streamed_source(name_or_path: str, *, weights: bool = True, code: bool = False) -> Source:
    """Find a model that can be streamed; the arguments are those of `plop_ext.models.source.find`."""
    source = find(name_or_path, weights=weights, code=code)
    if source.adapter is not None:
        raise InputError(
            f"`name_or_path` {name_or_path!r} is an adapter, and streaming reads the files of one model: stream what "
            "PEFT's `merge_and_unload` returns, or score the adapter in memory"
        )
    if source.gguf is not None:
        raise InputError(f"`name_or_path` {name_or_path!r} is a GGUF file: it cannot be streamed; score it in memory")
    return source


def _reset_peaks(device: torch.device, dtype: torch.dtype) -> None:
    """Measure the memory of the process and the device from now on."""
    if device.type == "cuda":
        square = torch.ones(64, 64, dtype=dtype, device=device)
        (square @ square).sum().item()  # loads CUDA's libraries into RAM, whose size the budget has to include
        torch.cuda.reset_peak_memory_stats(device)
    memory.reset_peak_rss()


def _peaks(device: torch.device) -> dict[str, int | None]:
    """Return the peak memory in use since `_reset_peaks`; None for device memory on a CPU."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"peak_rss": memory.peak_rss(), "peak_device": on_device}


def _rooms(figures: plan.Plan, device: torch.device, budget: int | None) -> tuple[int, int]:
    """Return the bytes of hidden states that may be kept on the device and in RAM."""
    if budget is not None:
        return figures.rooms(device, budget, memory.rss())
    ram = int(memory.available_ram() * _SHARE)
    if device.type == "cpu":
        return figures.rooms_in_free(device, ram, ram)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # unused, in torch's cache
    return figures.rooms_in_free(device, int(free * _SHARE), ram)
