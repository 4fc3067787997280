"""Placements for exports, with models that have their modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from plop_ext.lora_target import LoraTarget
from plop_ext.placement import Placement
from tests.support.tiny_lm import tiny_llama


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers, those of the head too."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def placed_on(model: nn.Module, chosen: Callable[[str], Any], *, parameters: bool = False, **fields: Any) -> Placement:
    """A placement on the modules in blocks for whose names `chosen` is true, as `Scores.place` makes it.

    Args:
        model: The model.
        chosen: By the name of a module or a parameter.
        parameters: Whether stacked experts compete too, and dense MLPs as parameters.
        fields: Further fields of the placement.
    """
    targets = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            targets.append(LoraTarget.of_module(name, module.in_features, module.out_features))
    if parameters:
        for name, weight in model.named_parameters():
            if weight.dim() == 3:
                experts, rows, columns = weight.shape
                targets.append(LoraTarget(name, True, experts * (rows + columns), (experts, rows, columns)))
    picked = tuple(target for target in targets if chosen(target.name))
    return Placement(
        modules=tuple(target.name for target in picked),
        types=("a",),
        strategy="types",
        label="picked",
        model=type(model).__name__,
        lora_targets=picked,
        left_out=tuple(target for target in targets if target not in picked),
        unscored=("lm_head",),
        **fields,
    )


def tiny_mixture() -> Qwen3MoeForCausalLM:
    """A mixture of experts with stacked weights."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
    )
    return Qwen3MoeForCausalLM(config).eval()


def llama() -> nn.Module:
    """A Llama with eleven blocks, so that names of one block begin as those of another."""
    return tiny_llama(num_hidden_layers=11, hidden_size=8, intermediate_size=12, num_attention_heads=2)


# What exports have to say, on `llama`.
CASES: dict[str, Callable[[nn.Module], Placement]] = {
    "types": lambda model: placed_on(model, lambda name: re.search("(v_proj|up_proj|gate_proj)$", name)),
    "attention": lambda model: placed_on(model, lambda name: re.search("[qkvo]_proj$", name)),
    "everything": lambda model: placed_on(model, lambda name: True),
    "one module": lambda model: placed_on(model, lambda name: name == "model.layers.1.self_attn.v_proj"),
    "a few": lambda model: placed_on(model, lambda name: re.search(r"\.(1|3)\..*(q|k|down)_proj$", name)),
    "q everywhere, k once": lambda model: placed_on(model, lambda name: re.search(r"q_proj$|\.1\..*k_proj$", name)),
    "other numbers": lambda model: placed_on(model, lambda name: name.endswith("o_proj"), r=6),
    "ranks": lambda model: placed_on(
        model,
        lambda name: re.search(r"\.(0|1|10)\..*(v|up)_proj$", name),
        r=4,
        ranks={
            f"model.layers.{layer}.{name}": rank
            for layer, rank in ((0, 4), (1, 2), (10, 3))
            for name in ("self_attn.v_proj", "mlp.up_proj")
        },
    ),
}

# What they have to say on `tiny_mixture`.
EXPERT_CASES: dict[str, Callable[[nn.Module], Placement]] = {
    "experts alone": lambda model: placed_on(
        model, lambda name: name.endswith("1.mlp.experts.down_proj"), parameters=True
    ),
    "experts and attention": lambda model: placed_on(
        model, lambda name: re.search(r"0\.mlp\.experts\.|v_proj$", name), parameters=True
    ),
}
