"""The attention masks that transformers makes, without a look at the values of any tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from plop_ext.forwards.batch import CACHES
from plop_ext.forwards.masks.thread_patch import ThreadPatch

# Those that every transformers model that takes them may be called without. What else is called so is a model's own.
_DECODER_MASK = "decoder_attention_mask"
_MASKS = ("attention_mask", _DECODER_MASK)
# With these in a batch, a mask of ones and no mask may mean different things.
_CONTEXT = ("position_ids", *CACHES)
# Where transformers decides whether to look at values. The second is of 5.17: later ones have no such module.
_TRACING = ("masking_utils", "is_tracing")
_TRACING_OF_5_17 = ("modeling_attn_mask_utils", "is_tracing")
_PACKED = ("masking_utils", "find_packed_sequence_indices")
_ADVICE = ("modeling_utils", "is_tracing")
_PATCHES = {place: ThreadPatch(place[1]) for place in (_TRACING, _TRACING_OF_5_17, _PACKED, _ADVICE)}


class UnknownMasks(Exception):
    """This transformers decides on masks in a way that is not known here; the message says which."""


def without_all_ones_masks(batch: Any) -> Any:
    """The batch with None for each attention mask that masks nothing, which means the same to a transformers model.

    It computes attention without a mask either way, but of a mask of ones it must look at every value to know. A batch
    with positions keeps its masks: without one the model takes positions that start again for samples in one row. So
    does one with a key-value cache, which a mask may leave out, and one whose mask [B, T] is for no input [B, T, ...]:
    what is wrong with it, the model says.
    """
    if not isinstance(batch, Mapping) or not batch.keys().isdisjoint(_CONTEXT):
        return batch

    def is_all_ones(name: Any, value: Any) -> bool:
        return _is_mask(name, value) and value.shape in _extents(batch, name) and bool((value == 1).all())

    return {name: None if is_all_ones(name, value) else value for name, value in batch.items()}


@contextmanager
def decided_masks(inputs: Any, plain: bool) -> Iterator[None]:
    """Within the block transformers makes the attention masks it makes eagerly, without a look at any value.

    Left to itself it looks at the values of masks and positions, for which the host waits; during a capture it takes
    every mask for one that masks something and every batch for a packed one, so that other, slower kernels run. Here
    the masks that are still there after `without_all_ones_masks` mask something, and the model counts positions by
    itself, so that nothing is packed. Nor does it look for padding among unmasked tokens, to advise a mask. Where that
    is not known a capture looks as well, and fails. Other threads notice nothing.

    Args:
        inputs: The batch.
        plain: Whether it goes to a transformers model as it is, by `default_forward`.

    Raises:
        UnknownMasks: On entry, if this transformers decides elsewhere: it would take other paths.
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
                    f"it is not known how transformers {release} decides on attention masks: its {module_name} has no "
                    f"`{name}`"
                )
            stack.enter_context(_PATCHES[place](module, decision))
        yield


def _extents(batch: Mapping[Any, Any], mask: Any) -> set[torch.Size]:
    """[B, T] of all inputs [B, T, ...] that a mask may be for. Labels are one of decoders behind an encoder only."""
    none = _MASKS if mask == _DECODER_MASK else (*_MASKS, "labels")
    return {value.shape[:2] for name, value in batch.items() if isinstance(value, Tensor) and name not in none}


def _is_mask(name: Any, value: Any) -> bool:
    return name in _MASKS and isinstance(value, Tensor) and value.dim() == 2
