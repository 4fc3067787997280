"""The names of Megatron's modules for those of transformers, for verl and Megatron-Bridge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set

from plop_ext.lora_target import LoraTarget
from plop_ext.placement.exports._rules import module_name
from plop_ext.placement.exports._stack import Plan

# Megatron fuses q, k and v, and gate and up; its canonical LoRA takes them apart again.
_CANONICAL = {
    "self_attn.q_proj": "self_attention.linear_q",
    "self_attn.k_proj": "self_attention.linear_k",
    "self_attn.v_proj": "self_attention.linear_v",
    "self_attn.o_proj": "self_attention.linear_proj",
    "mlp.gate_proj": "mlp.linear_fc1_gate",
    "mlp.up_proj": "mlp.linear_fc1_up",
    "mlp.down_proj": "mlp.linear_fc2",
}
_FUSED = {
    **dict.fromkeys(("linear_q", "linear_k", "linear_v"), "linear_qkv"),
    **dict.fromkeys(("linear_fc1_gate", "linear_fc1_up"), "linear_fc1"),
}
_BLOCK = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
CAUTION = (
    "An entry *.layers.N counts blocks from the first of the model: train without pipeline parallelism, where each "
    "stage counts anew."
)


def entry(target: LoraTarget) -> str | None:
    """Return the pattern of Megatron for a module of a decoder; None for other modules and fused weights."""
    return entry_of(module_name(target) or "")


def entry_of(name: str) -> str | None:
    """Return the pattern for a name in the model of transformers."""
    found = _BLOCK.fullmatch(name)
    path = _CANONICAL.get(found[2]) if found else None
    return f"*.layers.{found[1]}.{path}" if found and path else None


def catches(entries: Set[str], names: Iterable[str]) -> list[str]:
    """Return those of the names in the model of transformers whose modules patterns adapt."""
    return [name for name in names if entry_of(name) in entries]


def patterns(plan: Plan) -> list[str]:
    """Return the targets: the bare name of a module whose every block gets LoRA, otherwise its patterns by block.

    A bare name also holds for each stage of a pipeline. The parts of one fused weight have the same form, because a
    block takes the parts of the first entry that matches it.
    """
    chosen = {_leaf(name) for name in plan.modules}
    others = {_leaf(name) for name in map(entry_of, plan.left_out) if name is not None}
    partly = {_FUSED.get(leaf, leaf) for leaf in chosen & others}

    def written(name: str) -> str:
        leaf = _leaf(name)
        return name if _FUSED.get(leaf, leaf) in partly else leaf

    return list(dict.fromkeys(map(written, plan.modules)))


def _leaf(pattern: str) -> str:
    return pattern.rsplit(".", 1)[-1]
