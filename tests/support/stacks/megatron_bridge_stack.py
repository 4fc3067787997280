"""Megatron-Bridge: its `CanonicalLoRA`, asked module by module, by Megatron's names, which parts it adapts."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

from torch import nn

from tests.support.placed_models import linear_names, llama
from tests.support.stacks import Adapted
from tests.support.stacks.stand_ins import skip_init, stand_in

stand_in("torchao", "transformer_engine", "megatron.core", "megatron.bridge.training", "megatron.bridge.models")
stand_in("megatron.bridge.utils.common_utils")
_found = importlib.util.find_spec("megatron")
assert _found is not None and _found.submodule_search_locations is not None
_bridge = next(path for folder in _found.submodule_search_locations if (path := Path(folder, "bridge")).is_dir())
for _package in ("", "peft", "utils"):
    skip_init(f"megatron.bridge.{_package}".rstrip("."), str(_bridge / _package))

# Names in a model of transformers to Megatron's module and, of a fused one, the part.
PARTS = {
    "self_attn.q_proj": ("self_attention.linear_qkv", "linear_q"),
    "self_attn.k_proj": ("self_attention.linear_qkv", "linear_k"),
    "self_attn.v_proj": ("self_attention.linear_qkv", "linear_v"),
    "self_attn.o_proj": ("self_attention.linear_proj", None),
    "mlp.gate_proj": ("mlp.linear_fc1", "linear_fc1_gate"),
    "mlp.up_proj": ("mlp.linear_fc1", "linear_fc1_up"),
    "mlp.down_proj": ("mlp.linear_fc2", None),
}


def adapted(path: str) -> Adapted:
    return of_object(runpy.run_path(path)["peft"])


def of_object(peft: Any) -> Adapted:
    """The modules that an object of Megatron-Bridge adapts."""
    found = {}
    for name in linear_names(llama()):
        head, _, path = name.partition("layers.")
        index, _, path = path.partition(".")
        if head != "model." or path not in PARTS:
            continue
        module, part = PARTS[path]
        prefix, _, leaf = f"decoder.layers.{index}.{module}".rpartition(".")
        matched = peft.match(nn.Identity(), leaf, prefix)
        if matched is not None and (part is None or part in peft.canonical_mapping[matched[0]]):
            found[name] = (peft.dim, peft.alpha)
    return found
