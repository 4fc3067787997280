"""Writes a trained adapter, and loads it back before the run counts as done."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from plop_ext.errors import InputError, OutputError, first_line
from plop_ext.files import atomic_folder
from plop_ext.finetuning.record import write_record
from plop_ext.placement.round_trip import check_loaded, load, own_values

_ADAPTER = "default"
# Kernels that add in no fixed order differ in the last bits of a half-precision logit.
_TOLERANCE = 0.02


def save_adapter(adapted: Any, record: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write an adapter with its record and card to `path`, a new or empty folder, atomically.

    Args:
        adapted: The model with its adapter.
        record: What the run depended on and came to, from `make_record`.
        path: The folder.

    Raises:
        OutputError: If the folder is in use or cannot be written.
    """
    from safetensors import SafetensorError

    try:
        with atomic_folder(path) as scratch:
            # The default "auto" makes PEFT ask the hub whether the vocabulary was resized.
            adapted.save_pretrained(scratch, save_embedding_layers=False)
            write_record(scratch, record)
    except SafetensorError as error:  # in which the library wraps what the system refused
        raise OutputError(f"cannot write `{path}`: {first_line(error)}; free some space") from error


def check_saved(adapted: Any, path: str | os.PathLike[str], logits: Callable[[], Tensor]) -> None:
    """Check that the adapter at `path`, loaded into the emptied model, gives the values and the logits of the model.

    Args:
        adapted: The model whose adapter was saved; it has its own values afterwards.
        path: The folder.
        logits: Computes logits of the model.

    Raises:
        InputError: If a value or the logits differ.
    """
    from peft import load_peft_weights

    expected = logits()
    with own_values(adapted, _ADAPTER) as values:
        saved = load_peft_weights(os.path.expanduser(path), device=str(adapted.device))
        wanted = {name: value.clone() for name, value in values.items()}
        for value in values.values():
            value.zero_()
        try:
            check_loaded(wanted, load(adapted, _ADAPTER, saved))
        except InputError as error:
            raise InputError(f"{error}; `{path}` holds all values under the names of the model") from None
        off = (logits() - expected).abs().max()
        if not off <= _TOLERANCE * expected.abs().max():
            raise InputError(f"`{path}` was written, but loaded again it gives other logits, by up to {off:.3g}")
