"""LoRA values that PEFT saves but does not load.

To load adapters of earlier releases, PEFT applies the model's rules for old *checkpoints* to the names in an adapter,
also to the names that it wrote itself. A rule whose pattern fits a new name too (`shared_expert.`, where the dot
matches the "s" of `shared_experts`) then sends the values to a module that does not exist, with a warning at most.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from plop_ext.lora_target import LoraTarget

_PREFIX = "base_model.model."
_ADAPTER = "default"


def lost_on_reload(model: nn.Module, targets: Iterable[LoraTarget]) -> set[str]:
    """Return the names of the targets whose LoRA PEFT does not load as it was saved.

    The installed PEFT is asked with empty tensors. Without PEFT, or with a release that renames nothing, the result is
    empty.

    Args:
        model: The model without adapters.
        targets: The modules and parameters.
    """
    if not _has_renamings(model):
        return set()
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:
        return set()

    def lost(some: Iterable[LoraTarget]) -> set[str]:
        keys = {target.name: _keys(target) for target in some}
        saved = {key: torch.empty(1, 1, device="meta") for names in keys.values() for key in names}
        loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), dict(saved), _ADAPTER)
        return {name for name, names in keys.items() if any(loaded.get(key) is not saved[key] for key in names)}

    targets = tuple(targets)
    try:
        return lost(targets)
    except Exception:  # a rule that fits a name but not its value ends every load: find the names that do it
        found: set[str] = set()
    for target in targets:
        try:
            found |= lost([target])
        except Exception:
            found.add(target.name)
    return found


def _has_renamings(model: Any) -> bool:
    """Return whether transformers knows old names of the model's weights: if not, PEFT leaves an adapter alone."""
    mappings = sys.modules.get("transformers.conversion_mapping")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    find = getattr(mappings, "get_checkpoint_conversion_mapping", None)
    return find is not None and model_type is not None and find(model_type) is not None


def _keys(target: LoraTarget) -> list[str]:
    """Return the names of the target's values in a file of PEFT, also those that another parameter would give it."""
    owner = target.name.rpartition(".")[0] if target.parameter else target.name
    nested = ("", "base_layer.") if target.parameter else ("",)
    return [f"{_PREFIX}{owner}.{inner}lora_{matrix}.weight" for inner in nested for matrix in "AB"]
