"""Times candidates in interleaved rounds, so that drift of clocks and temperature hits all of them alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# About 2 ms: longer than the host needs to launch what a queued candidate launches.
_SLEEP_CYCLES = 4_000_000


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        name: Its name in the result.
        run: What is timed; receives what `attach` yields.
        attach: Context entered before and left after each timing, outside of it (hooks).
        queued: Let a CUDA device wait until the host has launched some milliseconds of work: kernels are timed back to
            back. Otherwise the launches count as far as the device waits for them, as in a forward.
    """

    name: str
    run: Callable[[Any], object]
    attach: Callable[[], AbstractContextManager[Any]] = nullcontext
    queued: bool = False


@dataclass(frozen=True)
class Summary:
    """Median and 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    def row(self, prefix: str, digits: int = 4) -> dict[str, float]:
        """Return the three values as fields of a result row, named `prefix`, `prefix_p20` and `prefix_p80`."""
        return {
            prefix: round(self.median, digits),
            f"{prefix}_p20": round(self.p20, digits),
            f"{prefix}_p80": round(self.p80, digits),
        }


def summarize(values: Sequence[float]) -> Summary:
    low, middle, high = np.quantile(np.asarray(values), (0.2, 0.5, 0.8))
    return Summary(float(middle), float(low), float(high))


def ratios(values: Sequence[float], base: Sequence[float]) -> Summary:
    """Summary of value / base round by round: what both share in a round cancels."""
    return summarize([value / other for value, other in zip(values, base, strict=True)])


def time_once(candidate: Candidate, device: torch.device, *, lead: bool = False) -> float:
    """Return the seconds of one run: by CUDA events on CUDA, else wall clock; `lead` as for `measure`."""
    with candidate.attach() as attached:
        if device.type != "cuda":
            started = time.perf_counter()
            candidate.run(attached)
            return time.perf_counter() - started
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        if candidate.queued:
            torch.cuda._sleep(_SLEEP_CYCLES)
        if lead:
            candidate.run(attached)
        start.record()
        candidate.run(attached)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


def measure(
    candidates: Sequence[Candidate],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 1,
    at_least_s: float = 0.0,
    lead: bool = False,
) -> Mapping[str, list[float]]:
    """Return the seconds of each candidate in each round, after `warmup` uncounted rounds.

    Rounds have the orders of `orders`, so that no candidate is always behind the same one. More than `rounds` rounds
    are run until `at_least_s` seconds have passed.

    With `lead` each run on a CUDA device follows an unmeasured one of its own at once, as the second of two batches
    does. A GPU at its power limit lowers its clock for what the work before asked of it, so that a forward would be
    timed at the clock of another; and the host is as far ahead as the candidate lets it run.
    """
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    number, until = -warmup, time.perf_counter() + at_least_s
    for order in orders(len(candidates)):
        if number >= rounds and time.perf_counter() >= until:
            break
        for candidate in (candidates[place] for place in order):
            elapsed = time_once(candidate, device, lead=lead)
            if number >= 0:
                seconds[candidate.name].append(elapsed)
        number += 1
    return seconds


def orders(count: int) -> Iterator[tuple[int, ...]]:
    """Orders of `count` candidates, without end.

    They come in blocks, `count` orders or twice as many where that is odd: Latin squares balanced for what comes
    before (E. J. Williams, 1949). In a block each candidate is in each place, and behind each other one, as often as
    all are. The orders of a block are shuffled with a fixed seed.
    """
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]  # 0, 1, -1, 2, -2, ...
    block = [tuple((number + shift) % count for number in zigzag) for shift in range(count)]
    if count % 2:
        block += [order[::-1] for order in block]
    shuffled = random.Random(0)
    while True:
        yield from shuffled.sample(block, len(block))


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph: its kernels back to back, without the host's launch cost."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def synchronize(device: torch.device) -> None:
    """Wait for what runs on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give unused memory of `device` back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
