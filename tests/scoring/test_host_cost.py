"""What a run does once per module is linear in the number of modules: DeepSeek-V3 has 45,000 matrices."""

from __future__ import annotations

import cProfile
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.host_cost import make, parts

KINDS = ["linear layers", "experts"]
# Parts that draw resamples or sort do a little more per module; a quadratic one does eight times as much.
MOST = 1.3


def operations(call: Callable[[], Any]) -> int:
    """The calls of Python and C functions that `call` makes."""
    profile = cProfile.Profile()
    profile.runcall(call)
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_of_a_run_makes_as_many_calls_per_module(kind: str) -> None:
    small, large = (388, 1552) if kind == "experts" else (28, 112)
    counts: list[dict[str, int]] = []
    for modules in (small, large):
        counts.append({})
        for name, part in parts(make(kind, modules)):
            part()  # once before it is counted: caches fill, modules are imported
            counts[-1][name] = operations(part)
    growth = {name: counts[1][name] / counts[0][name] / (large / small) for name in counts[0]}
    assert {name: value for name, value in growth.items() if value > MOST} == {}, growth


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_part_of_a_run_takes_as_long_per_module(kind: str) -> None:
    """Also what happens inside one call, such as that of a list or of numpy; CPU time, the least of three."""
    torch.set_num_threads(1)
    small, large = 2_000, 16_000
    seconds: list[dict[str, float]] = []
    for modules in (small, large):
        seconds.append({})
        for name, part in parts(make(kind, modules)):
            seconds[-1][name] = min(_seconds(part) for _ in range(3))
    growth = {name: seconds[1][name] / seconds[0][name] / (large / small) for name in seconds[0]}
    long = {name for name, value in seconds[1].items() if value > 0.05}  # below, start-up counts
    assert {name: value for name, value in growth.items() if name in long and value > 2.5} == {}, growth


def _seconds(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began
