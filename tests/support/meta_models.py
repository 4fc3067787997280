"""Every model class of transformers on the meta device: names without weights, from six layers of each stack."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

# Enough for every kind of layer in the usual patterns, such as five of one kind before one of another.
_LAYERS = 6
_DEPTH = re.compile(r"\w*(num_hidden_layers|num_layers|n_layers?|depth|_layers)|layers")
# Marks a module as accelerate marks an offloaded one, so that the lack of values is no reason against it.
_ELSEWHERE = SimpleNamespace(offload=True)


def class_names() -> list[str]:
    """The names of all classes that an Auto class of transformers makes, sorted."""
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for field, mapping in vars(modeling_auto).items():
        if field.startswith("MODEL_") and field.endswith("MAPPING_NAMES"):
            for made in mapping.values():
                names.update((made,) if isinstance(made, str) else made)
    return sorted(names)


def config_class(name: str) -> Any | None:
    """The class of the configuration of a model class; None if its libraries are missing."""
    import transformers

    try:
        return getattr(transformers, name).config_class
    except (AttributeError, ImportError):
        return None


def on_meta(name: str) -> Any | None:
    """The model of a class with the sizes of its default configuration; None if these make no model here."""
    import transformers

    cls = getattr(transformers, name, None)
    for shrunk in (True, False):
        try:
            config = cls.config_class()
            if shrunk:
                _shrink(config)
            with torch.device("meta"):
                model = cls(config)
        except Exception:  # whatever a default configuration lacks: a size, a library, a mode
            continue
        for module in model.modules():
            module._hf_hook = _ELSEWHERE
        return model
    return None


def _shrink(config: Any) -> None:
    for field, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            _shrink(value)
        elif type(value) is int and value > _LAYERS and _DEPTH.fullmatch(field):
            setattr(config, field, _LAYERS)


def models(names: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Those of the classes that can be made, by name."""
    for name in names:
        model = on_meta(name)
        if model is not None:
            yield name, model
