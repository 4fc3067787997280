"""Fused kernels and graphs of models that several processes hold: kept for replicas, declined by name for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plop_ext.layers import at_rest
from plop_ext.layers.communication import why_communicating
from tests.support import fast_models
from tests.support.parallel_models import divided
from tests.support.processes import in_processes
from tests.support.quiet import nfn, quietly
from tests.support.sharded_models import by_blocks, flat


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 97, (2, 24), generator=generator)} for _ in range(3)]


def fast(wrap: Callable[[nn.Module], nn.Module], model: nn.Module) -> tuple[dict[str, float], dict[str, Any]]:
    scores = quietly(wrap(model), batches(), fast=True)
    return nfn(scores), scores.provenance["fast"]


@fast_models.needs_native
def test_replicas_keep_the_fused_kernels() -> None:
    model = fast_models.make("llama")
    expected, _ = fast(lambda model: model, model)
    for found, report in in_processes(2, fast, DistributedDataParallel, model):
        assert found == expected
        assert report == {"blocks": 4, "reason": None}


DECLINED: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "FSDP2": (by_blocks, "the weights are sharded"),
    "FSDP1": (lambda model: flat(model, use_orig_params=False), "the weights are sharded"),
    "tensor parallel": (divided, "tensor or expert parallelism divides the model"),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", DECLINED)
@pytest.mark.filterwarnings("ignore:.*`fast`")
def test_forwards_in_which_processes_communicate_decline_by_name(wrap: str) -> None:
    model = fast_models.make("llama", num_key_value_heads=4)
    expected = nfn(quietly(model, batches()))
    around, reason = DECLINED[wrap]
    for found, report in in_processes(2, fast, around, model):
        assert report["blocks"] == 0 and reason in report["reason"]
        assert found == pytest.approx(expected, rel=1e-6)


def reason_of(wrap: Callable[[nn.Module], nn.Module], model: nn.Module) -> str:
    wrapped = wrap(model)
    with at_rest(wrapped):
        return why_communicating(wrapped)


@pytest.mark.slow
def test_graphs_ask_the_same_question() -> None:
    """Capture needs CUDA; `GraphedForwards` stops for the reason that this function gives."""
    model = fast_models.make("llama", num_key_value_heads=4)
    for around, reason in DECLINED.values():
        assert all(reason in found for found in in_processes(2, reason_of, around, model))
    assert in_processes(2, reason_of, DistributedDataParallel, model) == ["", ""]
