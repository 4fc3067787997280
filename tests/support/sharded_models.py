"""A model sharded in the ways that torch and transformers know, in the processes of `in_processes`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy


def blocks(model: Any) -> Any:
    """The list of blocks of a Llama-like or GPT-2 model."""
    inner = getattr(model, "model", model)
    return inner.layers if hasattr(inner, "layers") else model.transformer.h


def by_blocks(model: nn.Module, **settings: Any) -> nn.Module:
    for block in blocks(model):
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def by_layers(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            fully_shard(module)
    return fully_shard(model)


def hybrid(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, distributed.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return by_blocks(model, mesh=mesh)


def gathered_after_a_forward(model: nn.Module) -> nn.Module:
    model = by_blocks(model, reshard_after_forward=False)
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long))
    return model


def flat(model: nn.Module, **settings: Any) -> nn.Module:
    policy = ModuleWrapPolicy({type(blocks(model)[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **settings)


def adapted_by_blocks(model: Any) -> nn.Module:
    """A model of PEFT, sharded by the blocks of the model inside."""
    for block in blocks(model.get_base_model()):
        fully_shard(block)
    return fully_shard(model)


def with_compiled_blocks(model: nn.Module) -> nn.Module:
    for block in blocks(model):
        block.compile(backend="eager")
    return by_blocks(model)


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "FSDP2": by_blocks,
    "FSDP2, root only": fully_shard,
    "FSDP2, each layer": by_layers,
    "FSDP2, not resharded": lambda model: by_blocks(model, reshard_after_forward=False),
    "FSDP2, gathered": gathered_after_a_forward,
    "FSDP2, resharded to one": lambda model: by_blocks(model, reshard_after_forward=1),
    "FSDP2, mixed precision": lambda model: by_blocks(model, mp_policy=HALF),
    "FSDP2, each block": adapted_by_blocks,
    "FSDP2, compiled": lambda model: torch.compile(by_blocks(model), backend="eager"),  # type: ignore[dict-item]
    "FSDP2, compiled blocks": with_compiled_blocks,
    "HSDP": hybrid,
    "FSDP1": lambda model: flat(model, use_orig_params=False),
    "FSDP1, original parameters": lambda model: flat(model, use_orig_params=True),
    "FSDP1, mixed precision": lambda model: flat(model, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16)),
}


def sharded(model: nn.Module, wrap: str) -> nn.Module:
    """A copy of `model`, sharded as `wrap` says."""
    return WRAPS[wrap](copy.deepcopy(model))


def held(model: nn.Module) -> list[tuple[Any, ...]]:
    """What this process holds of each parameter, and the numbers of hooks of each module."""
    parameters = [
        (name, type(weight).__name__, tuple(weight.shape), getattr(weight, "placements", None), _bytes(weight))
        for name, weight in model.named_parameters()
    ]
    hooks = [
        (name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for name, module in model.named_modules()
    ]
    return [*parameters, *hooks]


def _bytes(weight: Any) -> int:
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    return int(local.untyped_storage().nbytes())
