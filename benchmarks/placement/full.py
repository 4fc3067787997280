"""Full finetuning, the ceiling: every parameter of the model, on the same examples in the same order."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.placement.adam import schedule
from benchmarks.placement.encode import Encoded
from benchmarks.placement.models import blocks_of, hidden_states
from benchmarks.placement.replicas import answer_losses
from benchmarks.placement.settings import Settings
from benchmarks.placement.train import Outcome, example_order

_EVALUATED = 256


def finetune(
    base: nn.Module, data: dict[str, Encoded], rate: float, seed: int, settings: Settings, device: torch.device
) -> Outcome:
    """Train a copy of `base` (float32; bfloat16 products on a GPU) on `data` and evaluate it."""
    model = copy.deepcopy(base).to(device).requires_grad_(True)
    blocks = blocks_of(model, settings.compile)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=device.type == "cuda")
    factors = schedule(settings.steps).tolist()
    order = example_order(len(data["train"].tokens), settings.steps, settings.batch, seed).to(device)
    for factor, rows in zip(factors, order, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        losses, _ = _losses(model, blocks, data["train"], rows)
        (losses.sum() / (data["train"].labels[rows] >= 0).sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    validation, test = (_evaluate(model, data[split]) for split in ("validation", "test"))
    return Outcome(*validation, *test)


def _losses(model: Any, blocks: list[Any], examples: Encoded, rows: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
        hidden = hidden_states(model, blocks, examples.tokens[rows])
        return answer_losses(hidden, model.lm_head, examples.positions[rows], examples.labels[rows])


@torch.no_grad()
def _evaluate(model: Any, examples: Encoded) -> tuple[float | None, float]:
    blocks = blocks_of(model, compiled=False)
    rows = torch.arange(len(examples.tokens), device=examples.tokens.device)
    found = [_losses(model, blocks, examples, part) for part in rows.split(_EVALUATED)]
    mean = float(sum(losses.sum() for losses, _ in found) / (examples.labels >= 0).sum())
    exact = float(torch.cat([right for _, right in found]).float().mean())
    return mean if math.isfinite(mean) else None, exact
