"""The class of a model and its configuration, from a checkpoint's config.json."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch

from plop_ext.models.code import Trust
from plop_ext.models.explained import explained
from plop_ext.models.source import Source

_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")
# Which of the classes that a checkpoint brings is loaded, in this order.
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel")


def read_config(source: Source, trust: Trust) -> Any:
    """Return the configuration of a model.

    Raises:
        InputError: If config.json is damaged, or describes no model that transformers knows.
    """
    from transformers import AutoConfig

    with explained(source.name, "config"):
        return AutoConfig.from_pretrained(str(source.folder), trust_remote_code=trust.given, **source.gguf_option)


def model_class(config: Any, trust: Trust) -> tuple[Any, dict[str, Any]]:
    """Return the class to load a checkpoint with, and the arguments that allow or forbid the checkpoint's own code.

    A checkpoint that declares a causal language model, or no class, is loaded as a causal language model if there is
    one of its type. Any other is loaded as the class that it declares, or without a head.
    """
    import transformers

    brought = getattr(config, "auto_map", None) or {}
    declared = (getattr(config, "architectures", None) or [""])[0]
    if trust.given and any(name in brought for name in _AUTO_CLASSES):
        auto = next(name for name in _AUTO_CLASSES if name in brought)
        return getattr(transformers, auto), {"trust_remote_code": True}
    own_code = {"trust_remote_code": trust.given}
    if not declared or declared.endswith(_CAUSAL_SUFFIXES):
        causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        return (transformers.AutoModelForCausalLM if causal else transformers.AutoModel), own_code
    found = getattr(transformers, declared, None)
    return (transformers.AutoModel, own_code) if found is None else (found, {})


def build(
    name: str,
    config: Any,
    trust: Trust,
    dtype: Any,
    attn_implementation: str | None,
    place: AbstractContextManager[Any],
) -> Any:
    """Build a model without its weights.

    Args:
        name: The model, as the user named it.
        config: Its configuration.
        trust: Whether code of the checkpoint may run.
        dtype: Type of the parameters, or None.
        attn_implementation: Attention implementation, or None.
        place: Puts the parameters elsewhere, such as `torch.device("meta")`.

    Raises:
        InputError: If the configuration describes no model that can be built.
    """
    cls, options = model_class(config, trust)
    make = getattr(cls, "from_config", None)
    if make is None:
        make, options = cls._from_config, {}
    if attn_implementation:
        options = {**options, "attn_implementation": attn_implementation}
    if dtype is not None:
        options = {**options, "dtype": dtype}
    with explained(name, "config"), place:
        model = make(config, **options)
    model.tie_weights()  # accelerate's empty weights are untied
    return model


def build_on_meta(name: str, config: Any, trust: Trust) -> Any:
    """Build a model that takes no memory, from a copy of its configuration."""
    return build(name, copy.deepcopy(config), trust, None, None, torch.device("meta"))
