"""A model that DeepSpeed's ZeRO-3 partitions: bitwise the scores of one process, and partitioned again."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
from torch import Tensor, nn

from tests.support import tiny_models
from tests.support.processes import in_processes
from tests.support.quiet import nfn, quietly

deepspeed: Any = pytest.importorskip("deepspeed")


def batches() -> list[dict[str, Tensor]]:
    return [tiny_models.token_batch(lengths, seed=seed) for seed, lengths in enumerate(([20, 9], [14, 16], [8, 8]))]


def score_partitioned(model: nn.Module, stage: dict[str, Any]) -> tuple[Any, ...]:
    # It compiles an operator at its first use, and a run that is killed meanwhile blocks all later ones.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend="gloo")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **stage}}
    engine, *_ = deepspeed.initialize(model=copy.deepcopy(model), config=config)
    for _ in range(2):  # the second forward gathers small weights for good
        quietly(engine, batches())
    before = [weight.numel() for weight in engine.module.parameters()]
    scores = quietly(engine, batches())
    after = [weight.numel() for weight in engine.module.parameters()]
    return nfn(scores), scores.totals.values.tobytes(), scores.provenance["model"], after == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("threshold", [{}, {"stage3_param_persistence_threshold": 0}], ids=["default", "all"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_partitioned_model_is_bitwise_identical_to_one_process(count: int, threshold: dict[str, Any]) -> None:
    model = tiny_models.qwen2()
    one = quietly(model, batches())
    expected = (nfn(one), one.totals.values.tobytes(), one.provenance["model"], True)
    assert in_processes(count, score_partitioned, model, threshold) == [expected] * count
