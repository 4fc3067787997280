"""What of a batch decides which kernels a forward launches, and the masks whose values do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from plop_ext.scoring.own_thread import ThreadPatch
from plop_ext.scoring.transfer import overwrite

_MASK = "attention_mask"
_POSITIONS = "position_ids"
# Where transformers decides whether to look at values. The second is of 5.17: later ones have no such module.
_TRACING = ("masking_utils", "is_tracing")
_TRACING_OF_5_17 = ("modeling_attn_mask_utils", "is_tracing")
_PACKED = ("masking_utils", "find_packed_sequence_indices")
_ADVICE = ("modeling_utils", "is_tracing")
_PATCHES = {place: ThreadPatch(place[1]) for place in (_TRACING, _TRACING_OF_5_17, _PACKED, _ADVICE)}


class Ungraphable(Exception):
    """What no graph can serve; the message says why."""


def launch_key(batch: Any) -> Hashable:
    """Equal for batches that differ only in the values of their tensors.

    Raises:
        Ungraphable: If there is no telling, as of an object of a foreign class.
    """
    if isinstance(batch, Tensor):
        if batch.layout != torch.strided:
            raise Ungraphable(f"a batch holds a tensor of layout {batch.layout}")
        return batch.dtype, tuple(batch.shape), batch.stride()
    if isinstance(batch, Mapping):
        return tuple((name, launch_key(value)) for name, value in batch.items())
    if isinstance(batch, (tuple, list)):
        return tuple(map(launch_key, batch))
    if batch is None or isinstance(batch, (bool, int, float, str)):
        return type(batch), batch
    raise Ungraphable(f"a batch holds a {type(batch).__name__}, which may stand for anything")


def tensors(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in the same order for batches of one `launch_key`."""
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch with a copy of each tensor on `device`, none of which is the caller's."""
    if isinstance(batch, Tensor):
        copy = torch.empty_like(batch, device=device)
        overwrite(copy, batch)
        return copy
    if isinstance(batch, Mapping):
        return {name: on_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [on_device(value, device) for value in batch]
    return batch


def without_idle_masks(batch: Any) -> Any:
    """The batch with None for each [B, T] mask that masks nothing, which means the same to a transformers model.

    It computes attention without a mask either way, but of a mask of ones it must look at every value to know.
    """
    if not isinstance(batch, Mapping):
        return batch
    return {name: None if _is_mask(name, value) and bool(value.all()) else value for name, value in batch.items()}


@contextmanager
def decided_masks(inputs: Any, plain: bool) -> Iterator[None]:
    """Within the block transformers makes the attention masks it makes eagerly, without a look at any value.

    Left to itself it looks at the values of masks and positions, for which the host waits; during a capture it takes
    every mask for one that masks something and every batch for a packed one, so that other, slower kernels run. Here
    the masks that are still there after `without_idle_masks` mask something, and the model counts positions by itself,
    so that nothing is packed. Nor does it look for padding among unmasked tokens, to advise a mask. Where that is not
    known a capture looks as well, and fails. Other threads notice nothing.

    Args:
        inputs: The batch.
        plain: Whether it goes to a transformers model as it is, by `default_forward`.

    Raises:
        Ungraphable: On entry, if this transformers decides elsewhere: it would be captured on other paths.
    """
    fields = inputs if isinstance(inputs, Mapping) else {}
    known = plain and isinstance(inputs, (Mapping, Tensor)) and _POSITIONS not in fields
    masked = known and any(_is_mask(name, value) for name, value in fields.items())

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
                raise Ungraphable(
                    f"it is not known how transformers {release} decides on attention masks: its {module_name} has no "
                    f"`{name}`"
                )
            stack.enter_context(_PATCHES[place](module, decision))
        yield


def _is_mask(name: Any, value: Any) -> bool:
    return isinstance(name, str) and name.endswith(_MASK) and isinstance(value, Tensor) and value.dim() == 2
