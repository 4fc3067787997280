"""Scores on several GPUs over NCCL, under torchrun, and prints by how much each way differs from one process.

torchrun --nproc-per-node 2 -m tests.support.on_gpus
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from plop_ext.scores import Scores
from plop_ext.scoring.score import score
from plop_ext.statistics import StopRule
from tests.support import tiny_models


def data(number: int = 7) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 32)
    return [
        {
            "input_ids": torch.randint(3, tiny_models.VOCAB, shape, generator=generator),
            "sample_ids": torch.tensor([2 * i, 2 * i + 1]),
        }
        for i in range(number)
    ]


def sharded(model: Any) -> nn.Module:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "DDP": DistributedDataParallel,
    "FSDP2": sharded,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "token step": {"token_step": 3},
    "fast": {"fast": True},
    "graph": {"graph": True},
    "early stop": {"stop": StopRule(types=2, confidence=0.6, min_samples=4)},
    "shards": {},
}


def quietly(model: nn.Module, batches: Any, **options: Any) -> Scores:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return score(model, batches, **{"max_samples": None, "progress": False, **options})


def difference(found: Scores, one: Scores) -> float:
    """The largest relative difference of NFN; infinite if samples or modules differ, 0 if bitwise identical."""
    if found.sample_ids.tolist() != one.sample_ids.tolist() or found.module_names != one.module_names:
        return float("inf")
    if found.totals.values.tobytes() == one.totals.values.tobytes() and (found.nfn == one.nfn).all():
        return 0.0
    return float(abs(found.nfn / one.nfn - 1).max()) or 1e-300


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl", timeout=timedelta(seconds=60), device_id=device)
    torch.manual_seed(0)
    model = tiny_models.qwen2().to(device)
    found: dict[str, float] = {}
    for name, options in OPTIONS.items():
        one = quietly(copy.deepcopy(model), data(), process_group=None, **options)
        for wrap, wrapped in WRAPS.items():
            if wrap == "FSDP2" and name in ("fast", "graph"):  # another way to run the forward
                continue
            batches = data()[rank::size] if name == "shards" else data()
            found[f"{wrap}, {name}"] = difference(quietly(wrapped(copy.deepcopy(model)), batches, **options), one)
    print(json.dumps({"rank": rank, "differences": found}), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
