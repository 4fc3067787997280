"""What scoring adds to a forward: candidates, memory and statistics of `scoring_overhead` and `cpu_overhead`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import Row
from benchmarks.rivals import BestHooks, PublishedScript, UsualHooks
from benchmarks.timing import Candidate, measure, ratios, summarize, time_once
from plop_ext.collecting.collector import Collector
from plop_ext.forwards.choose import choose_forwards
from plop_ext.forwards.protocol import Forwards
from plop_ext.layers import LinearLayer, discover
from plop_ext.scoring.baseline import frobenius_norms
from plop_ext.streams.batch import BatchStreams

PLAIN = "plain forward"
OURS = "plop_ext"
USUAL = "usual hooks"
BEST = "best plain-PyTorch hooks"
PUBLISHED = "published script"
FAST = f"{OURS} fast"
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """A model and the batch it runs on.

    Attributes:
        model: In evaluation mode.
        input_ids: [B, T], on the model's device.
        mask: [B, T] bool on the host, where a dataloader leaves it; every token counts.
        layers: What is scored.
    """

    model: nn.Module
    input_ids: Tensor
    mask: Tensor
    layers: tuple[LinearLayer, ...]

    @property
    def hookable(self) -> tuple[LinearLayer, ...]:
        """The layers whose input and output a hook sees: all but stacked experts."""
        return tuple(layer for layer in self.layers if not layer.adapter.routed)

    def forward(self) -> None:
        with torch.no_grad():
            self.model(input_ids=self.input_ids, use_cache=False)


def make_case(model: nn.Module, vocab_size: int, batch: int, tokens: int, device: torch.device) -> Case:
    ids = torch.randint(0, vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))
    return Case(model, ids.to(device), torch.ones(batch, tokens, dtype=torch.bool), discover(model).layers)


@contextmanager
def scoring(
    case: Case, step: int = 1, *, fast: bool = False, graph: bool = False
) -> Iterator[tuple[Callable[[], None], Forwards]]:
    """One forward as `plop_ext.score` runs it on `input_ids` alone, of which every `step`-th token is read."""
    with (
        Collector(case.model, case.layers) as collector,
        choose_forwards(case.model, None, collector, fast=fast, graph=graph) as forwards,
    ):

        def run() -> None:
            with torch.no_grad():
                streams = BatchStreams.of_mask(len(case.input_ids), case.mask)
                forwards.run({"input_ids": case.input_ids}, streams, step=step, phase=step // 2)

        if fast:
            run()  # the first batch checks the kernels
        yield run, forwards


def step_name(step: int) -> str:
    """Return what plop_ext is called that reads every `step`-th token."""
    return OURS if step == 1 else f"{OURS}, token_step={step}"


def scoring_candidate(case: Case, step: int = 1) -> Candidate:
    """plop_ext, reading every `step`-th token."""
    return Candidate(step_name(step), lambda scored: scored[0](), lambda: scoring(case, step))


def hook_candidates(case: Case, steps: Sequence[int] = (1, 8)) -> list[Candidate]:
    """Return the plain forward, plop_ext reading every `steps`-th token, and both kinds of plain-PyTorch hooks.

    The hooks leave stacked experts out: what they see of them is one input and one output for all.
    """
    modules = {layer.name: layer.module for layer in case.hookable}

    def usual(hooks: UsualHooks) -> None:
        case.forward()

    def best(hooks: BestHooks) -> None:
        case.forward()
        hooks.end()

    return [
        Candidate(PLAIN, lambda _: case.forward()),
        *(scoring_candidate(case, step) for step in steps),
        Candidate(USUAL, usual, lambda: UsualHooks(modules)),
        Candidate(BEST, best, lambda: BestHooks(modules, case.input_ids.numel(), case.input_ids.device)),
    ]


def fast_candidate(case: Case) -> Candidate:
    """Scoring on the fast path."""
    return Candidate(FAST, lambda scored: scored[0](), lambda: scoring(case, fast=True))


def published_candidate(case: Case) -> Candidate:
    """Return the published algorithm on the same forward."""

    def run(hooks: PublishedScript) -> None:
        case.forward()
        hooks.end()

    return Candidate(PUBLISHED, run, lambda: PublishedScript(case.model))


def measure_case(case: Case, *, rounds: int, published_rounds: int, candidates: Sequence[Candidate] = ()) -> list[Row]:
    """Tabulate one row per candidate: time, ratio to the plain forward of the same round, extra peak memory.

    The candidates are those of `hook_candidates`, `candidates` and the published script.

    The published script takes seconds and heats the device, so it runs last, in rounds of its own with a plain
    forward.
    """
    device = case.input_ids.device
    everyone = [*hook_candidates(case), *candidates]
    for _ in range(2):
        time_once(everyone[0], device)
    memory = {candidate.name: peak_memory(candidate, device) for candidate in everyone}
    seconds = dict(measure(everyone, device, rounds=rounds, lead=True))
    rows = [row(name, values, seconds[PLAIN], memory) for name, values in seconds.items()]
    for line in rows:
        print(f"{line['candidate']}: {line['ms']:.2f} ms, x {line['ratio']:.4f}", flush=True)
    if published_rounds:
        published = published_candidate(case)
        memory[PUBLISHED] = peak_memory(published, device)
        pair = measure([everyone[0], published], device, rounds=published_rounds, warmup=0)
        rows.append(row(PUBLISHED, pair[PUBLISHED], pair[PLAIN], memory))
        # Against ours from the interleaved rounds, not right after seconds of float32 matmuls.
        rows[-1]["times_plop_ext"] = round(rows[-1]["ms"] / summarize(seconds[OURS]).median / 1e3, 2)
        print(f"{PUBLISHED}: {rows[-1]['ms']:.1f} ms, x {rows[-1]['ratio']:.2f}", flush=True)
    return rows


def peak_memory(candidate: Candidate, device: torch.device) -> int | None:
    """Peak bytes of tensors above what lay there before the run; None where torch does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    time_once(candidate, device)
    return torch.cuda.max_memory_allocated(device) - before


def read_bytes(case: Case) -> dict[str, int]:
    """Return the bytes of activations to read: each distinct tensor once, and each input once per module."""
    counts = {"shared": 0, "per_module": 0}
    last: list[Tensor | None] = [None]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        fresh = args[0] is not last[0]
        last[0] = args[0]
        counts["shared"] += output.nbytes + (args[0].nbytes if fresh else 0)
        counts["per_module"] += output.nbytes + args[0].nbytes

    handles = [layer.module.register_forward_hook(hook) for layer in case.layers]
    try:
        case.forward()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def weight_norm_seconds(case: Case) -> float:
    """Return the seconds for the Frobenius norms of all weights, needed once per run; the second of two runs."""
    for _ in range(2):
        started = time.perf_counter()
        frobenius_norms(case.layers)
        elapsed = time.perf_counter() - started
    return elapsed


def synchronizations(case: Case) -> dict[str, int]:
    """Return how often a plain and a scored forward synchronize with the CUDA device, by torch's own check."""
    found = {PLAIN: count_waits(case.forward)}
    for step in (1, 8):
        with scoring(case, step) as (run, _):
            run()  # the arena is allocated once per run
            found[step_name(step)] = count_waits(run)
    return found


def count_waits(run: Callable[[], object]) -> int:
    """Return how often `run` synchronizes with the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def row(name: str, values: Sequence[float], plain: Sequence[float], memory: Mapping[str, int | None]) -> Row:
    """Return the figures of one candidate beside the plain forward's."""
    extra, base = memory[name], memory[PLAIN]
    return {
        "candidate": name,
        **summarize([value * 1e3 for value in values]).row("ms"),
        **ratios(values, plain).row("ratio"),
        "extra_peak_mib": None if extra is None or base is None else round((extra - base) / MIB, 1),
        "rounds": len(values),
    }
