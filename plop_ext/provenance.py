"""The provenance of a result: the model, and the versions of the software."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from plop_ext._version import __version__


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return class, name, architecture, size and type of a model.

    `parameters` counts packed weights of quantizers one by one if the model supports it (transformers does).
    `weight_bytes` includes buffers, because some quantizers store their weights there.
    """
    config = getattr(model, "config", None)
    parameters = [parameter for parameter in model.parameters() if not is_lazy(parameter)]
    count = getattr(model, "num_parameters", None)
    tensors = [*parameters, *(buffer for buffer in model.buffers() if not is_lazy(buffer))]
    # `fully_shard` replaces the class by a subclass of its own.
    kind = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed."))
    return {
        "class": kind.__name__,
        "name": getattr(config, "_name_or_path", None) or None,
        "type": getattr(config, "model_type", None),
        "parameters": count() if callable(count) else sum(map(torch.Tensor.numel, parameters)),
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
    }


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of this package and of the installed packages that scores depend on; cached."""
    found = {"plop_ext": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("transformers", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
