"""Weights of which this process holds only a part, or nothing, outside of their module's forward."""

from __future__ import annotations

import sys

from torch import Tensor, nn


def why_not_whole(module: nn.Module) -> str:
    """Return why the module's own weights cannot be read: they are shards, or FSDP has released them; or empty."""
    distributed = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    for weight in (*module._parameters.values(), vars(module).get("weight")):
        if isinstance(weight, distributed):
            return "its weight is sharded, by FSDP or tensor parallelism; score the model before it is sharded"
        if not isinstance(weight, Tensor) or type(weight) not in (nn.Parameter, Tensor):
            continue
        if weight.numel() and not weight.untyped_storage().size():
            return "its weight is released outside of its forward, by FSDP; score the model before it is sharded"
    return ""
