"""Which part of a multimodal model a module belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from plop_ext.errors import InputError
from plop_ext.layers.walk import base_model, base_modules

SCOPES = ("language", "vision", "audio", "all")

# Fields of a configuration, at any depth, that describe what reads or makes something else than text.
_FIELDS = {
    "vision_config": "vision",
    "image_config": "vision",
    "vit_config": "vision",
    "video_config": "vision",
    "audio_config": "audio",
    "audio_encoder": "audio",
    "audio_encoder_config": "audio",
    "speech_config": "audio",
    "talker_config": "audio",
    "token2wav_config": "audio",
    "code2wav_config": "audio",
}
# What tells the `encoder` of images or sound of an encoder-decoder (TrOCR, Donut, speech to text) from one of text.
_ENCODER_FIELDS = {
    "image_size": "vision",
    "num_channels": "vision",
    "num_mel_bins": "audio",
    "feat_extract_norm": "audio",
    "input_feat_per_channel": "audio",
    "conv_kernel_size": "audio",  # conformers
}
# Names that the field uses for encoders and for what leads from them into the language model.
_NAMES = {
    "vision": ("visual", "vision", "image", "img", "multi_modal_projector", "mm_projector", "qformer", "vit", "patch"),
    "audio": ("audio", "speech", "sound"),
}


def scope_of(model: nn.Module, scope: str) -> Callable[[str], bool]:
    """A test of module names: is it in `scope`?

    A model is multimodal if its configuration, or one inside it, describes an encoder of images or sound beside text.
    In any other model every module belongs, whatever it is named.

    Raises:
        InputError: If `scope` is unknown, or the model has no such part.
    """
    if scope not in SCOPES:
        raise InputError(f"`scope` must be one of {', '.join(SCOPES)}, got {scope!r}")
    classes = _encoder_classes(getattr(base_model(model), "config", None))
    kinds = set(classes.values())
    if scope == "all" or (not kinds and scope == "language"):
        return lambda name: True
    if scope != "language" and scope not in kinds:
        parts = ", ".join(sorted({"language", *kinds}))
        raise InputError(f'`model` has no {scope} part; scope="{scope}" selects nothing, it has: {parts}')
    prefixes = {
        name: classes[type(module.config)]
        for name, module in base_modules(model)
        if name and type(getattr(module, "config", None)) in classes
    }
    return lambda name: _part(name, prefixes) == scope


def _encoder_classes(config: Any) -> dict[type, str]:
    """Classes of the configurations inside `config` that describe an encoder, and what it encodes."""
    classes: dict[type, str] = {}
    fields = getattr(config, "__dict__", {})
    # Without a text model beside it, an `encoder_config` is of a model that only hears, of which all belongs.
    encoders = ("encoder", "encoder_config") if "text_config" in fields else ("encoder",)
    for field, inner in fields.items():
        kind = _kind_of_encoder(inner) if field in encoders else _FIELDS.get(field)
        if inner is not None and kind is not None:
            classes[type(inner)] = kind
        elif hasattr(inner, "to_dict"):
            classes = _encoder_classes(inner) | classes
    return classes


def _kind_of_encoder(config: Any) -> str | None:
    """What a configuration that is just called an encoder encodes, if it is not text."""
    kinds = {kind for field, kind in _ENCODER_FIELDS.items() if getattr(config, field, None) is not None}
    return min(kinds, default=None)  # spectrograms may have the fields of images


def _part(name: str, prefixes: dict[str, str]) -> str:
    for prefix, kind in prefixes.items():
        if name == prefix or name.startswith(prefix + "."):
            return kind
    for kind, words in _NAMES.items():
        if any(word in part.split("_") or word == part for part in name.lower().split(".") for word in words):
            return kind
    return "language"
