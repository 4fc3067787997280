"""Stacked experts of transformers 5: one module holds all experts of a layer as 3-D parameters.

A hook on that module cannot observe single experts. `plop_ext.collecting.routed_experts` observes the grouped forward
instead; this adapter describes its parts: the gate, up and down projection of each expert.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plop_ext import ops
from plop_ext.layers.adapter import LayerAdapter, Part, Unsupported, register_adapter
from plop_ext.layers.attributes import attribute, tensor
from plop_ext.layers.gram import grams, is_narrow
from plop_ext.layers.linear import check_in_place
from plop_ext.layers.sharded import division_of, row_sums, runs_whole_batch, shard_of
from plop_ext.layers.split import Split

_EXCHANGED = (
    "its experts are divided between processes and may receive tokens of other processes (all-to-all), whose samples "
    "cannot be told; load the model with `ep_size` equal to `tp_size`, or without expert parallelism"
)
_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "config")


def holds_stacked_experts(module: nn.Module) -> bool:
    """Return whether `module` is a set of stacked experts of any class, also one that cannot be scored."""
    down = tensor(module, "down_proj")
    return down is not None and down.dim() == 3


@dataclass(frozen=True)
class Projection:
    """One projection of all experts.

    Attributes:
        name: `gate_proj`, `up_proj` or `down_proj`.
        parameter: The 3-D parameter that holds it.
        split: Layout of that parameter's outputs; None if the projection is the whole parameter.
        index: Position of the projection in `split`.
    """

    name: str
    parameter: str
    split: Split | None
    index: int


@register_adapter
class ExpertsAdapter(LayerAdapter):
    """Classes decorated with `use_experts_implementation`: Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss, OLMoE and others.

    Weights are [E, M, K], or [E, K, M] if the class sets `is_transposed`.
    """

    kind = "stacked experts"
    routed = True
    divisible = True

    def matches(self, module: nn.Module) -> bool:
        return holds_stacked_experts(module) and all(attribute(module, flag) is not None for flag in _FLAGS)

    def check(self, module: nn.Module) -> None:
        layer: Any = module
        moe = sys.modules.get("transformers.integrations.moe")
        if not hasattr(moe, "_grouped_linear") or not hasattr(moe, "ALL_EXPERTS_FUNCTIONS"):
            raise Unsupported("the installed transformers has no grouped experts to observe")
        for parameter in ("gate_up_proj" if layer.has_gate else "up_proj", "down_proj"):
            weight = tensor(layer, parameter)
            if weight is None or weight.dim() != 3 or weight.dtype not in ops.FLOATS:
                raise Unsupported(f"its {parameter} is not a plain floating-point tensor of three dimensions")
        check_in_place(module)
        if division_of(module) is not None and not runs_whole_batch(vars(module).get("forward")):
            raise Unsupported(_EXCHANGED)

    def features(self, module: nn.Module) -> tuple[int, int]:
        """Return K and M of one expert's first projection."""
        part = self.parts(module, None)[0]
        return part.in_features, part.out_features

    def experts(self, module: nn.Module) -> int:
        """Return E, which `num_experts` of the module is not where experts are divided over processes."""
        down = tensor(module, "down_proj")
        assert down is not None
        return down.shape[0]

    def projections(self, module: nn.Module) -> tuple[Projection, ...]:
        """Return the gate, up and down projections, or up and down in classes without a gate."""
        layer: Any = module
        down = Projection("down_proj", "down_proj", None, 0)
        if not layer.has_gate:
            return Projection("up_proj", "up_proj", None, 0), down
        width = layer.gate_up_proj.shape[2 if layer.is_transposed else 1] // 2
        sizes = (width, width) if getattr(layer, "is_concatenated", True) else (1, 1)
        split = Split(("gate_proj", "up_proj"), sizes)
        return Projection("gate_proj", "gate_up_proj", split, 0), Projection("up_proj", "gate_up_proj", split, 1), down

    def parts(self, module: nn.Module, split: Split | None) -> tuple[Part, ...]:
        """Return the parts by projection: all experts of the first, then all of the second, and so on."""
        parts = []
        for projection in self.projections(module):
            weight = getattr(module, projection.parameter)
            experts, out_features, in_features = weight.shape
            if getattr(module, "is_transposed", False):
                in_features, out_features = out_features, in_features
            if projection.split is not None:
                out_features = projection.split.features(out_features, projection.index)
            for expert in range(experts):
                parts.append(Part(f".{expert}.{projection.name}", f".{projection.name}", in_features, out_features))
        return tuple(parts)

    def sums_shards(self, module: nn.Module) -> bool:
        return shard_of(tensor(module, "down_proj")) is not None and not getattr(module, "is_transposed", False)

    def part_sumsq(self, module: nn.Module, split: Split | None) -> Tensor:
        sums = []
        for projection in self.projections(module):
            weight = getattr(module, projection.parameter).detach()
            transposed = getattr(module, "is_transposed", False)
            if projection.split is not None and transposed:
                weight = _flat(projection.split.select(weight, projection.index))
            out = row_sums(weight, module)
            if projection.split is not None and not transposed:
                out = projection.split.select(out, projection.index).flatten(1)
            sums.append(out.sum(dim=1, dtype=torch.float64))
        return torch.cat(sums)

    def part_grams(self, module: nn.Module, split: Split | None) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for projection in self.projections(module):
            weight = getattr(module, projection.parameter)
            transposed = weight if getattr(module, "is_transposed", False) else weight.mT  # [E, K, M]
            if projection.split is not None:
                transposed = _flat(projection.split.select(transposed, projection.index))
            narrow = is_narrow(*transposed.shape[1:])
            found += [*grams(transposed).unsqueeze(1)] if narrow else [None] * len(transposed)
        return found

    def probe_part(self, module: nn.Module, part: int, z: Tensor) -> Tensor:
        """Return W z of one expert's projection: [P, K] to [P, M]."""
        layer: Any = module
        of, expert = divmod(part, self.experts(module))
        projection = self.projections(module)[of]
        weight = getattr(layer, projection.parameter)[expert]
        y = functional.linear(z, weight.T if layer.is_transposed else weight)
        return y if projection.split is None else _flat(projection.split.select(y, projection.index))

    def against_lora(self, module: nn.Module) -> str:
        return ""

    def lora_sizes(self, module: nn.Module) -> dict[str, int]:
        """Return the parameters that rank-1 LoRA adds to each 3-D parameter; in PEFT every expert has its own."""
        sizes = {}
        for projection in self.projections(module):
            experts, *features = getattr(module, projection.parameter).shape
            sizes[projection.parameter] = experts * sum(features)
        return sizes


def _flat(selected: Tensor) -> Tensor:
    """Return [..., groups, size] as a view [..., M]: groups or size is 1 for experts."""
    return selected.squeeze(-1) if selected.shape[-1] == 1 else selected.squeeze(-2)
