"""Which part of a multimodal model a module belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from plop_ext.errors import InputError
from plop_ext.layers.walk import base_model, base_modules

SCOPES = ("language", "vision", "audio", "all")

# Fields of a configuration that describe an encoder of something else than text.
_FIELDS = {
    "vision_config": "vision",
    "image_config": "vision",
    "vit_config": "vision",
    "video_config": "vision",
    "audio_config": "audio",
    "speech_config": "audio",
}
# Names that the field uses for encoders and for what leads from them into the language model.
_NAMES = {
    "vision": ("visual", "vision", "image", "img", "multi_modal_projector", "mm_projector", "qformer", "vit", "patch"),
    "audio": ("audio", "speech", "sound"),
}


def scope_of(model: nn.Module, scope: str) -> Callable[[str], bool]:
    """A test of module names: is it in `scope`?

    A model is multimodal if its configuration describes an encoder of images or sound beside text. In any other model
    every module belongs, whatever it is named.

    Raises:
        InputError: If `scope` is unknown, or the model has no such part.
    """
    if scope not in SCOPES:
        raise InputError(f"`scope` must be one of {', '.join(SCOPES)}, got {scope!r}")
    config = getattr(base_model(model), "config", None)
    kinds = {kind for field, kind in _FIELDS.items() if getattr(config, field, None) is not None}
    if scope == "all" or (not kinds and scope == "language"):
        return lambda name: True
    if scope != "language" and scope not in kinds:
        parts = ", ".join(sorted({"language", *kinds}))
        raise InputError(f'`model` has no {scope} part; scope="{scope}" selects nothing, it has: {parts}')
    prefixes = _encoders(model, config)
    return lambda name: _part(name, prefixes) == scope


def _encoders(model: nn.Module, config: Any) -> dict[str, str]:
    """Names of the modules that were built from an encoder's configuration, and what they encode."""
    classes = {
        type(getattr(config, field)): kind
        for field, kind in _FIELDS.items()
        if getattr(config, field, None) is not None
    }
    return {
        name: classes[type(module.config)]
        for name, module in base_modules(model)
        if name and type(getattr(module, "config", None)) in classes
    }


def _part(name: str, prefixes: dict[str, str]) -> str:
    for prefix, kind in prefixes.items():
        if name == prefix or name.startswith(prefix + "."):
            return kind
    for kind, words in _NAMES.items():
        if any(word in part.split("_") or word == part for part in name.lower().split(".") for word in words):
            return kind
    return "language"
