"""Names of a checkpoint's tensors that a wrapper has changed: those of DDP, FSDP, `torch.compile` and PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from plop_ext.errors import InputError

_ANYWHERE = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
_FIRST = rf"^(?:module\.|base_model\.model\.|{_ANYWHERE})+"
_INNER = rf"(?<=\.)(?:{_ANYWHERE})+"
_PEFT = "base_model.model."


def renamings(name: str, keys: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return patterns and replacements that give the tensors of a checkpoint the names of the plain model.

    Args:
        name: The model, as the user named it.
        keys: Names of the tensors in the checkpoint.
        names: Names of the model's own tensors.

    Returns:
        `key_mapping` of `from_pretrained`; empty if no wrapper has changed the names.

    Raises:
        InputError: If the checkpoint holds LoRA matrices that are not merged.
    """
    keys = list(keys)
    lora = next((key for key in keys if key.startswith(_PEFT) and ".lora_" in key), None)
    if lora is not None:
        raise InputError(
            f"`name_or_path` {name!r} holds a model with LoRA that is not merged, such as {lora}; save what PEFT's"
            " `merge_and_unload` returns, or the adapter alone"
        )
    own = [pattern for pattern in (_FIRST, _INNER) if any(re.search(pattern, name) for name in names)]
    patterns = {pattern: "" for pattern in (_FIRST, _INNER) if any(re.search(pattern, key) for key in keys)}
    return {} if own else patterns


def forget(model: Any, renamed: dict[str, str]) -> None:
    """Make `model.save_pretrained` write the names of the plain model, not those of its checkpoint."""
    conversions = getattr(model, "_weight_conversions", None)
    if renamed and conversions:
        model._weight_conversions = [item for item in conversions if not set(item.source_patterns) <= set(renamed)]
