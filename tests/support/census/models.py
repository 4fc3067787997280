"""The classes of transformers by kind, from its own tables, and their tiny models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from tests.support.census.exceptions import CHANGES
from tests.support.census.shrinking import tiny

# Kind to transformers' tables, in this order: a class belongs to the first kind that has it.
TABLES = {
    "causal": ("CAUSAL_LM",),
    "multimodal": ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),
    "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "speech": ("SPEECH_SEQ_2_SEQ",),
    "encoder": ("MASKED_LM",),
    "image": ("IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION"),
    "image and text": ("ZERO_SHOT_IMAGE_CLASSIFICATION",),
    "sound": ("CTC", "AUDIO_CLASSIFICATION"),
}


def classes() -> dict[str, tuple[str, str]]:
    """Class name to (kind, model type)."""
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[str, str]] = {}
    for kind, tables in TABLES.items():
        for table in tables:
            for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items():
                for name in names if isinstance(names, tuple) else (names,):
                    found.setdefault(name, (kind, model_type))
    return found


def builder(class_name: str, model_type: str) -> Callable[[], nn.Module]:
    """A function that makes the same tiny model again and again."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class = getattr(transformers, class_name)
    config_class = CONFIG_MAPPING[model_type]
    if not issubclass(config_class, model_class.config_class):
        config_class = model_class.config_class
    config = tiny(config_class(), CHANGES.get(class_name))

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return finished(model_class(copy.deepcopy(config)))

    return build


def finished(model: nn.Module) -> nn.Module:
    """Seeded weights far from the identity and nowhere all zero, and biases that would show if they counted."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            elif name.endswith("bias") or not parameter.any() or not parameter.isfinite().all():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.float().eval()
