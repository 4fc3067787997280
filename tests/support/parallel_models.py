"""A model divided over the processes of `in_processes`: tensor, sequence, expert and pipeline parallel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.support.sharded_models import blocks


def loaded(model: Any, folder: Path, **sizes: Any) -> nn.Module:
    """The model as transformers loads it in parallel, from a checkpoint that the test has written to `folder`."""
    from transformers.distributed.configuration_utils import DistributedConfig

    read: nn.Module = type(model).from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).eval()
    return read


def divided(model: nn.Module, sequence: bool = False) -> nn.Module:
    """A copy of a Llama-like model, by torch's tensor parallelism, optionally with sequence parallelism."""
    copied = copy.deepcopy(model)
    _divide(copied, init_device_mesh(_device(copied), (distributed.get_world_size(),)), sequence)
    return copied


def divided_and_sharded(model: nn.Module) -> nn.Module:
    """A copy on a mesh of two dimensions: FSDP over two processes, and tensor parallelism over the others."""
    copied = copy.deepcopy(model)
    sizes = (2, distributed.get_world_size() // 2)
    mesh = init_device_mesh(_device(copied), sizes, mesh_dim_names=("dp", "tp"))
    _divide(copied, mesh["tp"], sequence=False)
    for block in blocks(copied):
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(copied, mesh=mesh["dp"])


def divided_replicas(model: nn.Module) -> nn.Module:
    """A copy of which there are two, each divided over half of the processes."""
    copied = copy.deepcopy(model)
    sizes = (2, distributed.get_world_size() // 2)
    _divide(copied, init_device_mesh(_device(copied), sizes, mesh_dim_names=("dp", "tp"))["tp"], sequence=False)
    return copied


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _divide(model: nn.Module, mesh: Any, sequence: bool) -> None:
    def rowwise() -> Any:
        return RowwiseParallel(output_layouts=Shard(1)) if sequence else RowwiseParallel()

    every = list(blocks(model))
    for block in every:
        plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
        plan |= {"self_attn.o_proj": rowwise(), "mlp.down_proj": rowwise()}
        if sequence:
            norm: Callable[[], Any] = lambda: SequenceParallel(use_local_output=True)  # noqa: E731
            plan |= {"input_layernorm": norm(), "post_attention_layernorm": norm()}
            plan["self_attn"] = PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
                use_local_output=True,
            )
            plan["mlp"] = PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True
            )
        parallelize_module(block, mesh, plan)
    if sequence:
        begins = PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
        )
        ends = PrepareModuleOutput(
            output_layouts=(Shard(1),), desired_output_layouts=(Replicate(),), use_local_output=True
        )
        parallelize_module(every[0], mesh, begins)
        parallelize_module(every[-1], mesh, ends)
