"""The data of a `Trainer` of Lightning, in the `setup` hook of its module or before `fit`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from plop_ext.errors import InputError
from plop_ext.integrations.trainer_data import TrainerData
from plop_ext.layers import base_model


def left_alone(trainer: Any) -> AbstractContextManager[None]:
    """Restore nothing: a dataloader of Lightning is one of torch."""
    return nullcontext()


def data_of(trainer: Any, rows: str, module: Any = None, data: Any = None) -> TrainerData:
    """Return the training batches, and the model that the Lightning module holds.

    Args:
        trainer: The trainer.
        rows: Without meaning here.
        module: The Lightning module; default that of the running `fit`.
        data: A datamodule or batches; default those of the running `fit`.

    Raises:
        InputError: If module or data are unknown, or there are several models or dataloaders.
    """
    module = getattr(trainer, "lightning_module", None) if module is None else module
    if module is None:
        raise InputError("`model` is missing: `trainer` fits no module yet; pass the Lightning module")
    if data is None:
        source = getattr(trainer.fit_loop, "_data_source", None)
        data = trainer.datamodule or getattr(source, "instance", None)
    if data is None:
        raise InputError("`data` is missing: `trainer` fits no data yet; pass a datamodule or a dataloader")
    batches = data.train_dataloader() if hasattr(data, "train_dataloader") else data
    if isinstance(batches, (dict, list, tuple)):  # Lightning takes these for several dataloaders
        raise InputError(f"the training has {len(batches)} dataloaders; pass the one to score as `data`")
    return TrainerData(_model_in(module), batches)


def _model_in(module: Any) -> Any:
    """Return the only model in a Lightning module; the module itself if its forward is that of a model."""
    inner = base_model(module)
    if inner is not module:
        return inner
    models = [child for child in module.children() if hasattr(getattr(child, "config", None), "model_type")]
    return models[0] if len(models) == 1 else module
