"""The decisions of transformers on attention masks, made without reading the values of any tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from plop_ext.forwards.batch import CACHES
from plop_ext.forwards.masks.thread_patch import ThreadPatch

# The masks that are optional in every transformers model that takes them; masks of other names are a model's own.
_DECODER_MASK = "decoder_attention_mask"
_MASKS = ("attention_mask", _DECODER_MASK)
# If a batch holds one of these, a mask of ones and no mask may differ in meaning.
_CONTEXT = ("position_ids", *CACHES)
# The functions by which transformers decides whether to read values. The second exists in 5.17, not in later versions.
_TRACING = ("masking_utils", "is_tracing")
_TRACING_OF_5_17 = ("modeling_attn_mask_utils", "is_tracing")
_PACKED = ("masking_utils", "find_packed_sequence_indices")
_ADVICE = ("modeling_utils", "is_tracing")
_PATCHES = {place: ThreadPatch(place[1]) for place in (_TRACING, _TRACING_OF_5_17, _PACKED, _ADVICE)}


class UnknownMasks(Exception):
    """This version of transformers decides on masks in an unsupported way; the message names it."""


def without_all_ones_masks(batch: Any) -> Any:
    """Return the batch with None for each attention mask that masks nothing, which is equivalent in transformers.

    The model computes attention without a mask in either case, but it has to read every value of a mask of ones. These
    batches keep their masks: a batch with positions, because without a mask the model takes restarting positions for
    several samples in one row; a batch with a key-value cache, of which a mask may exclude tokens; and a batch whose
    mask [B, T] fits no input [B, T, ...], for which the model raises its own error.
    """
    if not isinstance(batch, Mapping) or not batch.keys().isdisjoint(_CONTEXT):
        return batch

    def is_all_ones(name: Any, value: Any) -> bool:
        return _is_mask(name, value) and value.shape in _extents(batch, name) and bool((value == 1).all())

    return {name: None if is_all_ones(name, value) else value for name, value in batch.items()}


@contextmanager
def decided_masks(inputs: Any, plain: bool) -> Iterator[None]:
    """Make transformers decide on masks within the block as it does eagerly, but without reading values.

    By default it reads the values of masks and positions, which synchronizes. During a capture it assumes that every
    mask masks something and every batch is packed, and runs other, slower kernels. Here, a mask that remains after
    `without_all_ones_masks` does mask something, and nothing is packed, because the model counts positions by itself.
    The search for padding among unmasked tokens, which only leads to a warning, is disabled. If none of this can be
    inferred from the batch, transformers reads the values, and a capture fails. Other threads are not affected.

    Args:
        inputs: The batch.
        plain: Whether the batch is passed unchanged to a transformers model, by `default_forward`.

    Raises:
        UnknownMasks: On entry, if this version of transformers decides in other functions.
    """
    fields = inputs if isinstance(inputs, Mapping) else {}
    masks = {name: value for name, value in fields.items() if _is_mask(name, value)}
    known = plain and isinstance(inputs, (Mapping, Tensor)) and fields.keys().isdisjoint(_CONTEXT)
    known = known and all(mask.shape in _extents(fields, name) for name, mask in masks.items())
    masked = known and bool(masks)

    def is_tracing(tensor: Any = None) -> bool:
        return masked and tensor is not None

    decisions: dict[tuple[str, str], Callable[..., Any]] = {_TRACING: is_tracing, _TRACING_OF_5_17: is_tracing}
    if known:
        decisions[_PACKED] = lambda position_ids: None
        decisions[_ADVICE] = lambda tensor=None: True
    with ExitStack() as stack:
        for place, decision in decisions.items():
            module_name, name = place
            module = sys.modules.get(f"transformers.{module_name}")
            if module is None:
                continue
            if not hasattr(module, name):
                release = getattr(sys.modules.get("transformers"), "__version__", "as installed")
                raise UnknownMasks(
                    f"transformers {release} decides on attention masks in an unsupported way: its {module_name} has "
                    f"no `{name}`"
                )
            stack.enter_context(_PATCHES[place](module, decision))
        yield


def _extents(batch: Mapping[Any, Any], mask: Any) -> set[torch.Size]:
    """Return [B, T] of all inputs [B, T, ...] that a mask may fit; labels only for a decoder behind an encoder."""
    none = _MASKS if mask == _DECODER_MASK else (*_MASKS, "labels")
    return {value.shape[:2] for name, value in batch.items() if isinstance(value, Tensor) and name not in none}


def _is_mask(name: Any, value: Any) -> bool:
    return name in _MASKS and isinstance(value, Tensor) and value.dim() == 2
