"""Rules of transformers for the names in old checkpoints, which PEFT applies to adapters too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def old_names(model_type: str, old: str, new: str) -> Iterator[None]:
    """Let checkpoints of `model_type` have `old`, a regular expression, where the model has `new`."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    known = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
    conversion_mapping.register_checkpoint_conversion_mapping(model_type, [WeightRenaming(old, new)], overwrite=True)
    try:
        yield
    finally:
        mappings = conversion_mapping._checkpoint_conversion_mapping_cache
        mappings.pop(model_type)
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard(model_type)
        if known is not None:
            mappings[model_type] = known
