"""Scores of models that several GPUs divide, under torchrun, and prints by how much each differs from one process.

torchrun --nproc-per-node 2 -m tests.support.on_gpus_divided
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tests.support import tiny_models
from tests.support.on_gpus import data, difference, quietly
from tests.support.parallel_models import divided, loaded


def flat(model: Any, use_orig_params: bool) -> nn.Module:
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    device = torch.device("cuda", torch.cuda.current_device())
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=device)


def half(model: Any) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.model.layers:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def of_files(folder: str, **sizes: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: loaded(model, folder, **sizes)  # type: ignore[arg-type]


def rows(folder: str, size: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    return {
        "FSDP1": lambda model: flat(model, use_orig_params=False),
        "FSDP1, original parameters": lambda model: flat(model, use_orig_params=True),
        "torch TP": divided,
        "torch TP, sequence parallel": lambda model: divided(model, sequence=True),
        "transformers TP": of_files(folder, tp_size=size, tp_plan="auto"),
        "transformers PP": of_files(folder, pp_size=size),
    }


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl", timeout=timedelta(seconds=60), device_id=device)
    torch.manual_seed(0)
    model: Any = tiny_models.llama(attention_bias=True, mlp_bias=True, num_key_value_heads=4).to(device)
    folders = [tempfile.mkdtemp() if rank == 0 else ""]
    distributed.broadcast_object_list(folders)
    if rank == 0:
        model.save_pretrained(folders[0])
    distributed.barrier()
    one = quietly(copy.deepcopy(model), data(), process_group=None)
    found: dict[str, Any] = {}
    for name, divide in rows(folders[0], size).items():
        try:
            found[name] = difference(quietly(divide(copy.deepcopy(model)), data()), one)
        except Exception as error:  # the other rows count too
            found[name] = f"{type(error).__name__}: {error}"
    halved = quietly(half(copy.deepcopy(model)), data())
    wanted = quietly(copy.deepcopy(model).bfloat16(), data()[:1], process_group=None)
    norms = [module.weight_norm for module in halved.modules]
    found["FSDP2, mixed precision"] = float(norms != [module.weight_norm for module in wanted.modules])
    print(json.dumps({"rank": rank, "differences": found}), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
