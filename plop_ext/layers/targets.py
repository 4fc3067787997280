"""The target that PEFT adapts for a layer: a module or a parameter, if PEFT supports it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from plop_ext.layers.adapter import LayerAdapter
from plop_ext.layers.experts import ExpertsAdapter
from plop_ext.lora_target import LoraTarget

# On models with stacked experts PEFT turns entries of `target_modules` with these leaf names into all experts of all
# layers (`peft.utils.transformers_weight_conversion`), also when an adapter is loaded. The weight itself, as a
# 2-D `target_parameters` entry, is left alone.
_REWRITTEN_LEAVES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
# PEFT refuses these leaves on these models, whose fused kernels read the weight without calling the module.
_REFUSING_MODELS = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
_REFUSED_LEAVES = {"out_proj", "conv1d"}


def target_of(
    model: nn.Module, name: str, module: nn.Module, adapter: LayerAdapter, part: int, is_moe: bool
) -> LoraTarget:
    """Find the target that PEFT adapts for part `part` of module `name`.

    Args:
        model: The model without adapters.
        name: Full module name.
        module: The module.
        adapter: Adapter of the module.
        part: Index of the part in the module.
        is_moe: Whether the model has stacked experts.
    """
    if isinstance(adapter, ExpertsAdapter):
        parameter = adapter.projections(module)[part // int(module.num_experts)].parameter  # type: ignore[arg-type]
        shape = tuple(getattr(module, parameter).shape)
        return LoraTarget(f"{name}.{parameter}", True, adapter.lora_sizes(module)[parameter], shape)
    target = LoraTarget(name, False, adapter.lora_size(module), adapter.features(module))
    leaf = name.rsplit(".", 1)[-1]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if leaf in _REFUSED_LEAVES and model_type in _REFUSING_MODELS:
        return replace(target, refused=f"PEFT refuses {leaf} on {model_type} models")
    if not is_moe or leaf not in _REWRITTEN_LEAVES:
        return target
    if adapter.weights != "weight" or not isinstance(module, nn.Linear):
        refused = f"PEFT would turn {leaf} into the experts, and cannot adapt a quantized weight by itself"
        return replace(target, refused=refused)
    return LoraTarget(f"{name}.weight", True, target.size, tuple(module.weight.shape))
