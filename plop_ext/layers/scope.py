"""The parts of a multimodal model: language, vision, audio, and others such as the expert of a robot's actions.

A module belongs to the part from whose configuration it was made: the class of `text_config` makes the language model,
that of `vision_config` a vision tower. If the language model is found this way, everything between it and the towers
(projectors, resamplers, aligners, mergers) belongs to the tower whose output it takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from plop_ext.errors import InputError
from plop_ext.layers.attributes import attribute
from plop_ext.layers.walk import base_model, base_modules

LANGUAGE, VISION, AUDIO, OTHER = "language", "vision", "audio", "other"
SCOPES = (LANGUAGE, VISION, AUDIO, "all")

# Words in the names of modules, and in the fields of configurations at any depth, that tell the modality of a part.
_WORDS = {
    VISION: {"vision", "visual", "image", "img", "video", "vit", "patch", "vq", "vqmodel"},
    AUDIO: {
        *("audio", "speech", "sound", "acoustic", "codec", "dac", "vocoder"),
        *("talker", "token2wav", "code2wav", "flow"),
    },
    OTHER: {"action", "dit", "protein", "multimodal"},
}
_LANGUAGE_FIELDS = {"text_config", "llm_config", "language_config", "text_encoder"}
# Fields of encoder-decoders, of any modality, identified by the fields that only some configurations have.
_EITHER_FIELDS = {"encoder", "decoder"}
_MODALITY_FIELDS = {
    "image_size": VISION,
    "num_channels": VISION,
    "num_mel_bins": AUDIO,
    "feat_extract_norm": AUDIO,
    "input_feat_per_channel": AUDIO,
    "conv_kernel_size": AUDIO,  # conformers
}
# Words in the names of what lies between a tower and the language model.
_BETWEEN = {"projector", "connector", "aligner", "merger", "resampler", "perceiver", "qformer"}
_BLOCK = re.compile(r"\.\d+\.")
# Words and names that tell language outside of the language model itself.
_TEXT = {"text", "language", "lm_head", "score", "classifier"}


def scope_of(model: nn.Module, scope: str) -> Callable[[str], bool]:
    """Return a predicate on module names: whether the module is in `scope`.

    A model is multimodal if its configuration, or one inside it, describes a part of another modality than text. In
    any other model, every module is in the scope `"language"`, regardless of its name.

    Raises:
        InputError: If `scope` is unknown, or the model has no such part.
    """
    if scope not in SCOPES:
        raise InputError(f"`scope` must be one of {', '.join(SCOPES)}, got {scope!r}")
    part = parts_of(model)
    if scope == "all" or (part is None and scope == LANGUAGE):
        return lambda name: True
    known = {LANGUAGE, *_other_modalities(base_model(model))}.intersection(SCOPES)
    if part is None or scope not in known:
        raise InputError(
            f'`model` has no {scope} part; scope="{scope}" selects nothing, it has: {", ".join(sorted(known))}'
        )
    return lambda name: part(name) == scope


def parts_of(model: nn.Module) -> Callable[[str], str] | None:
    """Return a function from the name of a module to its part of a multimodal model; None for any other model."""
    root = base_model(model)
    others = _other_modalities(root)
    if not others:
        return None
    config = attribute(root, "config")
    described = list(_described(config))
    modules = dict(base_modules(model))
    prefixes = {name: kind for name, module in modules.items() if name and (kind := _kind_of(module, described))}
    told = LANGUAGE in prefixes.values()
    between = next(iter(others)) if len(others) == 1 else VISION if VISION in others else OTHER
    rest = LANGUAGE if not told and _reads_tokens(config) else between

    def part(name: str) -> str:
        around = [prefixes[prefix] for prefix in _prefixes(name) if prefix in prefixes]
        outer = next((kind for kind in around if kind != LANGUAGE), None)
        if outer is not None:
            return outer
        words = _words(name)
        # Inside a block, a matrix of the language model may be named after the other part that it reads (Evolla).
        told_by = {**dict.fromkeys(_WORDS, words), OTHER: _words(_BLOCK.split(name)[0])}
        named = next((kind for kind in _WORDS if kind in others and told_by[kind] & _WORDS[kind]), None)
        if named is not None:
            return named
        if around:
            return LANGUAGE
        if words & _BETWEEN:
            return between
        outermost = name.partition(".")[0]
        is_head = outermost.endswith("head") or (outermost == name and name in modules and not modules[name]._modules)
        return LANGUAGE if told and (is_head or words & _TEXT) else rest

    return part


def parts_with(model: nn.Module, names: Iterable[str]) -> str:
    """Return the scope that holds the modules `names`: their part, or `"all"` if there are several."""
    part = parts_of(model)
    kinds = set() if part is None else {part(name) for name in names}
    return kinds.pop() if len(kinds) == 1 else "all"


def _other_modalities(root: nn.Module) -> set[str]:
    """Return the modalities beside text that a model's configuration, or the names of its submodels, describe."""
    kinds = {kind for kind, _ in _described(attribute(root, "config"))}
    whole = attribute(root, "base_model_prefix")
    for name, module in root._modules.items():
        if module is not None and name != whole and attribute(module, "main_input_name") is not None:
            kinds |= {kind for kind, known in _WORDS.items() if _words(name) & known}
    return kinds - {LANGUAGE}


def _described(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the modality and the configuration of each part that a configuration describes, at any depth."""
    fields = getattr(config, "__dict__", {})
    for field, inner in fields.items():
        if not hasattr(inner, "to_dict"):
            continue
        inside = list(_described(inner))
        kind = _kind_of_field(field, inner, fields)
        if kind is None and field in _EITHER_FIELDS and not inside and _reads_tokens(inner):
            kind = LANGUAGE
        if kind is not None:
            yield kind, inner
        if kind in (None, LANGUAGE):
            yield from inside


def _kind_of_field(field: str, config: Any, fields: Mapping[str, Any]) -> str | None:
    """Return the modality of the configuration `config`, one of `fields`; None if it has parts, or does not tell."""
    if field in _LANGUAGE_FIELDS:
        return LANGUAGE
    if field in _EITHER_FIELDS:
        return _kind_of_encoder(config)
    if field == "backbone_config":  # as of detection by text; without a `text_config`, a pure vision model
        return _kind_of_encoder(config) or VISION if "text_config" in fields else None
    if field == "encoder_config":  # without a `text_config`, a pure audio model, which counts as a whole
        return _kind_of_encoder(config) or AUDIO if "text_config" in fields else None
    words = _words(field)
    return next((kind for kind, known in _WORDS.items() if words & known), None)


def _kind_of_encoder(config: Any) -> str | None:
    """Return the modality of a configuration named just `encoder` or `decoder`, or None for text."""
    kinds = {kind for field, kind in _MODALITY_FIELDS.items() if getattr(config, field, None) is not None}
    return min(kinds, default=None)  # spectrograms may have the fields of images


def _kind_of(module: nn.Module, described: Sequence[tuple[str, Any]]) -> str | None:
    """Return the modality of the configuration from which a module was made, or None if no part has it."""
    config = attribute(module, "config")
    same = [(kind, other) for kind, other in described if type(other) is type(config)]
    kinds = {kind for kind, _ in same}
    if len(kinds) > 1:  # CLVP encodes text and speech by one class
        kinds = {kind for kind, other in same if other is config}
    return min(kinds, default=None)


def _reads_tokens(config: Any) -> bool:
    return getattr(config, "vocab_size", None) is not None


def _words(name: str) -> set[str]:
    components = name.lower().split(".")
    return {word for component in components for word in (component, *component.split("_"))}


def _prefixes(name: str) -> Iterator[str]:
    """Yield the names of the modules around a module, outermost first, and its own."""
    parts = name.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
