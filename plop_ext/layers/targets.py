"""The target that PEFT adapts for a layer: a module or a parameter, or the reason why PEFT cannot adapt it.

A target is refused here, before it is placed, if PEFT would refuse it, adapt something else in its place, compute
something else than the merged weight, or lose its values between saving and loading.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from plop_ext.layers.adapter import LayerAdapter
from plop_ext.layers.experts import ExpertsAdapter, holds_stacked_experts
from plop_ext.layers.reloading import lost_on_reload
from plop_ext.layers.sharded import shapes_known
from plop_ext.layers.tied import tied_weights
from plop_ext.layers.walk import plain_class
from plop_ext.lora_target import LoraTarget

# On models with stacked experts PEFT turns entries of `target_modules` with these leaf names into all experts of all
# layers (`peft.utils.transformers_weight_conversion`), also when an adapter is loaded. The weight itself, as a
# 2-D `target_parameters` entry, is left alone.
_REWRITTEN_LEAVES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
_REWRITTEN_FAMILIES = {"mixtral", "qwen2_moe"}
# PEFT refuses these leaves on these models, whose fused kernels read the weight without calling the module.
_REFUSING_MODELS = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
_REFUSED_LEAVES = {"out_proj", "conv1d"}
# Classes whose code reads the stride or the kernel size of their convolutions, which PEFT's wrapper lacks.
_READING_SIZES = {
    *("MimiConv1d", "PocketTTSAudioTokenizerConv1d"),
    *("MobileNetV1ConvLayer", "MobileNetV2ConvLayer", "ParakeetEncoderSubsamplingConv2D"),
    *("WhisperEncoder", "Qwen2AudioEncoder", "VoxtralEncoder", "MossTranscribeDiarizeAudioModel"),
}


class Adaptable(NamedTuple):
    """A matrix for which a target is wanted.

    Attributes:
        name: Full name of the module.
        module: The module.
        adapter: Adapter of the module.
        part: Index of the matrix among the parts of the module.
    """

    name: str
    module: nn.Module
    adapter: LayerAdapter
    part: int


def lora_targets(
    model: nn.Module, modules: Sequence[tuple[str, nn.Module]], layers: Sequence[Adaptable]
) -> list[LoraTarget]:
    """Find the target that PEFT adapts for each of the layers.

    Args:
        model: The model without adapters.
        modules: All its modules, by full name.
        layers: The matrices for which targets are wanted.
    """
    rewritten = _rewrites_leaves(model, modules)
    against_all = _against_model(model)
    tied = tied_weights(model, modules)
    by_name = dict(modules)
    targets = []
    for module, matrices in groupby(layers, key=lambda layer: layer.module):
        with shapes_known(module):
            found = [(layer, _target(layer, rewritten)) for layer in matrices]
        for layer, target in found:
            reason = against_all or target.refused or layer.adapter.against_lora(module)
            reason = reason or _against_leaf(model, layer.name) or _against_owner(by_name, layer)
            reason = reason or _against_tied(target, tied)
            targets.append(replace(target, refused=reason))
    lost = lost_on_reload(model, [target for target in targets if not target.refused])
    return [_lost(target) if target.name in lost else target for target in targets]


def _target(layer: Adaptable, rewritten: bool) -> LoraTarget:
    """Return the module or parameter that holds the matrix."""
    name, module, adapter, part = layer
    if isinstance(adapter, ExpertsAdapter):
        projections = adapter.projections(module)
        parameter = projections[part // adapter.experts(module)].parameter
        shape = tuple(getattr(module, parameter).shape)
        return LoraTarget(f"{name}.{parameter}", True, adapter.lora_sizes(module)[parameter], shape)
    target = LoraTarget(name, False, adapter.lora_size(module), adapter.features(module))
    leaf = name.rsplit(".", 1)[-1]
    if not rewritten or leaf not in _REWRITTEN_LEAVES:
        return target
    if adapter.weights != "weight" or not isinstance(module, nn.Linear):
        refused = f"PEFT would turn {leaf} into the experts, and cannot adapt a quantized weight by itself"
        return replace(target, refused=refused)
    return LoraTarget(f"{name}.weight", True, target.size, tuple(module.weight.shape))


def _rewrites_leaves(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> bool:
    """Return whether PEFT may rewrite leaves: by the type of the model, also if all its layers are dense."""
    if any(holds_stacked_experts(module) for _, module in modules):
        return True
    families = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    return families.get(_model_type(model)) in _REWRITTEN_FAMILIES


def _against_model(model: Any) -> str:
    """Return why PEFT cannot wrap the model at all: it asks for the embedding to which others may be tied."""
    ties = isinstance(getattr(model, "_tied_weights_keys", None), dict)
    if not ties or getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        return ""
    try:
        model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return f"PEFT cannot wrap {type(model).__name__}, whose `get_input_embeddings` is not implemented"
    return ""


def _against_leaf(model: nn.Module, name: str) -> str:
    leaf, model_type = name.rsplit(".", 1)[-1], _model_type(model)
    refuses = leaf in _REFUSED_LEAVES and model_type in _REFUSING_MODELS
    return f"PEFT refuses {leaf} on {model_type} models" if refuses else ""


def _against_owner(modules: Mapping[str, nn.Module], layer: Adaptable) -> str:
    if not isinstance(layer.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ""
    parts = layer.name.split(".")
    around = [modules[".".join(parts[:end])] for end in range(max(0, len(parts) - 2), len(parts))]
    reading = next((name for owner in around if (name := plain_class(owner).__name__) in _READING_SIZES), None)
    return "" if reading is None else f"{reading} reads its stride, which the wrapper of PEFT does not have"


def _against_tied(target: LoraTarget, tied: dict[str, str]) -> str:
    partner = tied.get(target.name if target.parameter else f"{target.name}.weight")
    if partner is None:
        return ""
    return f"its weight is shared with `{partner}`, which would change when LoRA is merged; untie the two first"


def _lost(target: LoraTarget) -> LoraTarget:
    return replace(target, refused="PEFT saves its LoRA, but renames the values when it loads them, and loses them")


def _model_type(model: Any) -> Any:
    return getattr(getattr(model, "config", None), "model_type", None)
