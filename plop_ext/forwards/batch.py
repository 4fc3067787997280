"""The contents of a dataloader's batches, and the call of a model on a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plop_ext.collecting.transfer import to_device
from plop_ext.errors import InputError

SAMPLE_IDS = "sample_ids"
# Names of a key-value cache in a batch and among the arguments of a block, by version of transformers.
CACHES = ("cache", "past_key_values")


def default_forward(model: nn.Module, scored: Collection[nn.Module]) -> Callable[[nn.Module, Any], Any]:
    """Return a function that calls the model on a batch, without work of transformers that no scored module needs."""
    extra: dict[str, Any] = {}
    dropped: set[str] = set()  # what only a loss reads
    if is_transformers_model(model):
        config: Any = model.config
        parameters = inspect.signature(model.forward).parameters
        keywords = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        if hasattr(config, "use_cache") and (keywords or "use_cache" in parameters):
            extra["use_cache"] = False
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if "logits_to_keep" in parameters and all(head is not module for module in scored):
            extra["logits_to_keep"] = 1
        dropped = {"completion_mask"} if "completion_mask" not in parameters else set()
        dropped |= set() if getattr(config, "is_encoder_decoder", False) else {"labels"}

    def run(model: nn.Module, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            inputs = {key: value for key, value in batch.items() if key not in dropped}
            return model(**{**extra, **inputs})
        if isinstance(batch, (tuple, list)):
            return model(*batch)
        return model(batch)

    return run


def is_transformers_model(model: nn.Module) -> bool:
    """Return whether the model takes its inputs as transformers models do."""
    return hasattr(getattr(model, "config", None), "model_type")


def take_sample_ids(batch: Any) -> tuple[Any, Any]:
    """Return the batch without its `sample_ids`, and these, or None if it has none."""
    if not isinstance(batch, Mapping) or SAMPLE_IDS not in batch:
        return batch, None
    rest = {key: value for key, value in batch.items() if key != SAMPLE_IDS}
    return rest, batch[SAMPLE_IDS]


def listed_ids(sample_ids: Any, first: int, samples: int) -> list[int]:
    """Return the ids of the `samples` samples of a batch; their numbers from `first` on if it has none."""
    if sample_ids is None:
        return list(range(first, first + samples))
    ids = torch.as_tensor(sample_ids)
    if ids.shape != (samples,):
        raise InputError(f"`sample_ids` in a batch must be [{samples}], one per sample, got {list(ids.shape)}")
    return ids.tolist()


def brings_cache(batch: Any) -> bool:
    """Return whether the batch holds a key-value cache, which a forward fills, so that the batch can run only once."""
    if isinstance(batch, Mapping):
        return any(map(brings_cache, batch.values()))
    if isinstance(batch, (tuple, list)):
        return any(map(brings_cache, batch))
    return callable(getattr(batch, "get_seq_length", None))


def batch_to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with all its tensors on `device`."""
    if isinstance(batch, Tensor):
        return to_device(batch, device)
    if isinstance(batch, Mapping):
        return {key: batch_to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [batch_to_device(value, device) for value in batch]
    return batch


def input_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter; the CPU if the parameter is offloaded."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type == "meta":
        return torch.device("cpu")
    return parameter.device


def length(dataloader: Iterable[Any]) -> int | None:
    """Return the number of batches, or None if the dataloader has no length."""
    try:
        return len(dataloader)  # type: ignore[arg-type]
    except TypeError:
        return None
