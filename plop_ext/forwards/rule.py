"""The rule by which a run that was asked for no way chooses one: from the model and its device, before any forward.

It holds no clock, so the same run takes the same way; `benchmarks/whole_api.py` measures what it chooses. Fused
kernels change the last bits of 16-bit scores: whether they run follows from the model, its device and the settings of
the run alone. A CUDA graph changes no bit, so it may also follow from the batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from plop_ext import ops
from plop_ext.forwards.fast.families import find_blocks
from plop_ext.forwards.masks.known_models import runs_library_code

AUTO = "auto"
_DTYPES = (torch.float16, torch.bfloat16)
# An estimate: the kernels of smaller blocks take less time than the checks of the first batch.
_LEAST_WEIGHTS = 10_000_000
# A forward is bound by the launches of its kernels if a block takes the device less than about a millisecond, in which
# it does this many multiplications.
_MULTIPLICATIONS = 3e11
# A capture takes as long as several eager batches: with at least this many batches to come it is made at the second of
# a kind, and otherwise at the fourth.
_MANY = 8
_EARLY, _LATE = 2, 4


@dataclass(frozen=True)
class Planned:
    """How much a run reads; None where that is not known, or the run may end early.

    Attributes:
        batches: Batches.
        samples: Samples.
    """

    batches: int | None = None
    samples: int | None = None

    def batches_of(self, size: int) -> int:
        """Return the number of batches of `size` samples; 0 if it is unknown."""
        known = [self.batches, None if self.samples is None else math.ceil(self.samples / max(1, size))]
        return min((count for count in known if count is not None), default=0)


@dataclass(frozen=True)
class GraphRule:
    """When a batch is captured in a run that did not ask for graphs.

    Attributes:
        tokens: Most tokens of a batch, padding included.
        planned: How much the run reads.
    """

    tokens: int
    planned: Planned

    def admits(self, batch: Any) -> bool:
        """Return whether batches of this kind may be captured."""
        ids = batch.get("input_ids") if isinstance(batch, dict) else batch
        return isinstance(ids, torch.Tensor) and ids.numel() <= self.tokens

    def occurrence(self, samples: int) -> int:
        """Return which batch of a kind is captured, counted from 1, for batches of `samples` samples."""
        return _EARLY if self.planned.batches_of(samples) >= _MANY else _LATE


@dataclass(frozen=True)
class Way:
    """A way to run the forwards.

    Attributes:
        fast: Run the supported blocks on fused kernels.
        graph: Replay forwards as CUDA graphs: always where it can be done, never, or by a rule.
        why: Why, for the provenance.
    """

    fast: bool
    graph: bool | GraphRule
    why: str


def choose(
    model: nn.Module,
    *,
    fast: bool | str,
    graph: bool | str,
    exact: bool,
    plain: bool,
    may_stop: bool,
    planned: Planned,
) -> Way:
    """Return the way to run the forwards of a run.

    Args:
        model: Prepared for scoring.
        fast: As for `score`; not true if `exact` is.
        graph: As for `score`.
        exact: As for `score`.
        plain: Whether batches run by `default_forward`.
        may_stop: Whether the run has a stop rule, which most often ends it after one or two batches: the checks of the
            first batch and a capture would take longer than they save.
        planned: How much the run reads.
    """
    asked = [f"`{name}` was given" for name, value in (("fast", fast), ("graph", graph)) if value != AUTO]
    if exact:
        asked.append("`exact` gives the scores of eager hooks")
    if fast != AUTO and graph != AUTO:
        return Way(bool(fast), bool(graph), "; ".join(asked))
    weights, obstacle = (0, "the run may stop early") if may_stop else _block_weights(model)
    chosen = bool(fast) if fast != AUTO else obstacle is None and not exact
    captured: bool | GraphRule = graph == AUTO and obstacle is None and plain and runs_library_code(model)
    if graph != AUTO:
        captured = bool(graph)
    elif captured:
        captured = GraphRule(int(_MULTIPLICATIONS / max(1, weights)), planned)
    rule = obstacle or "16-bit blocks of a supported family on a CUDA device"
    return Way(chosen, captured, "; ".join([*asked, rule]))


def _block_weights(model: nn.Module) -> tuple[int, str | None]:
    """Return the weights of the largest block, and why fused kernels and graphs are not chosen; None if they are."""
    blocks, left_out = find_blocks(model)
    if not blocks:
        return 0, left_out[0] if left_out else "no blocks of a supported family"
    parameters = [list(block.module.parameters()) for block in blocks]
    weights = max(sum(parameter.numel() for parameter in block) for block in parameters)
    devices = {parameter.device for parameter in model.parameters()}
    if {device.type for device in devices} != {"cuda"}:
        return weights, "not on a CUDA device"
    if len(devices) > 1:
        return weights, "on several devices"
    if ops.STATUS.backend(next(iter(devices))) == "pytorch":
        return weights, "no native kernels"
    if left_out:
        return weights, left_out[0]
    if any(parameter.dtype not in _DTYPES for block in parameters for parameter in block):
        return weights, "weights of other types than float16 and bfloat16"
    if weights < _LEAST_WEIGHTS:
        return weights, f"blocks of fewer than {_LEAST_WEIGHTS:,} weights"
    return weights, None
