"""The way of an adapter's values through PEFT: what is saved must be what is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.errors import InputError


def check_round_trip(peft_model: nn.Module, only: str | None = None) -> None:
    """Check that PEFT loads every LoRA value as it saves it; the model keeps its own values.

    PEFT renames values when it loads them, so that a release of it, or of transformers, can lose some. Each value is
    compared with a pattern of its own, because fresh values of B are zero everywhere.

    Args:
        peft_model: A model with adapters. One whose values are sharded, or not in memory, is not checked.
        only: The adapter to check; default all.

    Raises:
        InputError: If a value is lost.
    """
    owner = _owner(peft_model)
    for adapter, config in getattr(owner, "peft_config", {}).items():
        if only is not None and adapter != only:
            continue
        if getattr(config.peft_type, "value", config.peft_type) != "LORA":
            continue
        with own_values(owner, adapter) as values:
            if not _in_memory(owner, values):
                continue
            generator = torch.Generator().manual_seed(0)
            marked = {
                name: _pattern(value, generator) if "lora_" in name else value.clone()
                for name, value in values.items()
            }
            check_loaded(marked, load(owner, adapter, marked))


@contextmanager
def own_values(peft_model: Any, adapter: str) -> Iterator[dict[str, Tensor]]:
    """Give the values of an adapter by the names that PEFT saves, and write them back after the block."""
    values = saved_values(peft_model, adapter)
    copies = {name: value.clone() for name, value in values.items()}
    try:
        yield values
    finally:
        for name, value in values.items():
            value.copy_(copies[name])


def saved_values(peft_model: Any, adapter: str) -> dict[str, Tensor]:
    """Return the values of an adapter, sharing the model's memory, by the names that PEFT saves."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(peft_model, adapter_name=adapter, save_embedding_layers=False)


def load(peft_model: Any, adapter: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load values with PEFT, and return what the adapter holds then, sharing the model's memory."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(peft_model, dict(values), adapter_name=adapter)
    return saved_values(peft_model, adapter)


def check_loaded(saved: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Check that each value was loaded as it was saved.

    Raises:
        InputError: If one was not.
    """
    lost = [name for name, value in saved.items() if name not in loaded or not torch.equal(loaded[name], value)]
    if lost:
        raise InputError(
            f"PEFT loads {len(lost)} of {len(saved)} values of the adapter other than it saves them (`{lost[0]}`); "
            "score again with the installed PEFT, so that the placement leaves these modules out"
        )


def _owner(peft_model: nn.Module) -> Any:
    """Return the model that PEFT saves: its own wrapper, or the model to which adapters were added."""
    from peft import PeftModel

    from plop_ext.layers import base_model  # loads the kernels, which choosing from scores does not need

    inside = (module for module in peft_model.modules() if isinstance(module, PeftModel))
    return next(inside, None) or base_model(peft_model)


def _in_memory(owner: nn.Module, values: Mapping[str, Tensor]) -> bool:
    """Return whether the values are those of the model itself, not shards of them and not copies."""
    own = {weight.data_ptr() for weight in owner.parameters() if type(weight.data) is Tensor} - {0}
    return all(type(value) is Tensor and value.data_ptr() in own for value in values.values())


def _pattern(value: Tensor, generator: torch.Generator) -> Tensor:
    """Return random values along the longest dimension, repeated along the others without taking memory."""
    longest = max(range(value.dim()), key=lambda dim: value.shape[dim])
    shape = [size if dim == longest else 1 for dim, size in enumerate(value.shape)]
    return torch.randn(shape, generator=generator).to(value.device, value.dtype).expand(value.shape)
