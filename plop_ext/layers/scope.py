"""The scope of a module in a multimodal model: language, vision or audio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from plop_ext.errors import InputError
from plop_ext.layers.walk import base_model, base_modules

SCOPES = ("language", "vision", "audio", "all")

# Fields of a configuration, at any depth, that describe encoders and decoders of other modalities than text.
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
# Fields that only the configuration of an image or sound `encoder` has (TrOCR, Donut, speech to text).
_ENCODER_FIELDS = {
    "image_size": "vision",
    "num_channels": "vision",
    "num_mel_bins": "audio",
    "feat_extract_norm": "audio",
    "input_feat_per_channel": "audio",
    "conv_kernel_size": "audio",  # conformers
}
# Usual names of encoders and of their projectors into the language model.
_NAMES = {
    "vision": ("visual", "vision", "image", "img", "multi_modal_projector", "mm_projector", "qformer", "vit", "patch"),
    "audio": ("audio", "speech", "sound"),
}


def scope_of(model: nn.Module, scope: str) -> Callable[[str], bool]:
    """Return a predicate on module names: whether the module is in `scope`.

    A model is multimodal if its configuration, or one inside it, describes an encoder of images or sound beside text.
    In any other model, every module is in the scope `"language"`, regardless of its name.

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
    part = parts_of(model)
    assert part is not None
    return lambda name: part(name) == scope


def parts_of(model: nn.Module) -> Callable[[str], str] | None:
    """Return a function from the name of a module to its part of a multimodal model; None for any other model."""
    classes = _encoder_classes(getattr(base_model(model), "config", None))
    if not classes:
        return None
    prefixes = {
        name: classes[type(module.config)]
        for name, module in base_modules(model)
        if name and type(getattr(module, "config", None)) in classes
    }
    return lambda name: _part(name, prefixes)


def _encoder_classes(config: Any) -> dict[type, str]:
    """Return the classes of the configurations inside `config` that describe an encoder, with its modality."""
    classes: dict[type, str] = {}
    fields = getattr(config, "__dict__", {})
    # Without a `text_config`, an `encoder_config` describes a pure audio model, which counts as a whole.
    encoders = ("encoder", "encoder_config") if "text_config" in fields else ("encoder",)
    for field, inner in fields.items():
        kind = _kind_of_encoder(inner) if field in encoders else _FIELDS.get(field)
        if inner is not None and kind is not None:
            classes[type(inner)] = kind
        elif hasattr(inner, "to_dict"):
            classes = _encoder_classes(inner) | classes
    return classes


def _kind_of_encoder(config: Any) -> str | None:
    """Return the modality of a configuration named just `encoder`, or None for text."""
    kinds = {kind for field, kind in _ENCODER_FIELDS.items() if getattr(config, field, None) is not None}
    return min(kinds, default=None)  # spectrograms may have the fields of images


def _part(name: str, prefixes: dict[str, str]) -> str:
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        kind = prefixes.get(".".join(parts[:depth]))
        if kind is not None:
            return kind
    for kind, words in _NAMES.items():
        if any(word in part.split("_") or word == part for part in name.lower().split(".") for word in words):
            return kind
    return "language"
