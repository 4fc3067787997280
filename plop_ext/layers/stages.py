"""Pipeline parallelism: a process holds some blocks of the model, and each scores what it holds of the whole.

The layers of a run are those of the whole model, found on a copy without weights, so that all processes agree on
names, types and order. The modules of those that another process holds stay without weights, and are never called.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from plop_ext.errors import InputError
from plop_ext.layers.adapter import Unsupported, adapter_for
from plop_ext.layers.discovery import Discovery, LinearLayer, check_division, discover
from plop_ext.layers.offload import weights_elsewhere
from plop_ext.layers.walk import base_model, base_modules, plain_class
from plop_ext.unscored import UnscoredModule


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline.

    Attributes:
        group: The group of all stages.
        device: Device of this process.
        whole: The whole model, without weights.
    """

    group: Any
    device: torch.device
    whole: nn.Module

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of plain data that all stages gave."""
        found: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def added(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all stages of float64 values, each of which one stage gives, and the others as 0."""
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums, group=self.group)
        return sums.tolist()


def stages_group(model: nn.Module) -> Any:
    """Return the group of the stages among which transformers divides a model; None if it divides none."""
    stage: Any = getattr(base_model(model), "_pp_stage", None)
    return stage.pp_group if stage is not None and stage.pp_size > 1 else None


def stage_of(model: nn.Module) -> Stage | None:
    """Return the stage of a pipeline that `model` is, or None.

    Raises:
        InputError: If the whole model cannot be built from its configuration.
    """
    group = stages_group(model)
    if group is None:
        return None
    part: Any = base_model(model)
    weight = next(part.parameters())
    if getattr(part.config, "quantization_config", None) is not None:
        raise InputError("`model` is a stage of a pipeline with quantized weights; score the model without `pp_size`")
    kind: Any = plain_class(part)
    with torch.device("meta"):
        whole = kind._from_config(copy.deepcopy(part.config), dtype=weight.dtype)
    return Stage(group, weight.device, whole.eval())


def discover_whole(model: nn.Module, stage: Stage | None, **settings: Any) -> Discovery:
    """Find the linear layers of a model, of which `stage` may be a part; see `discover`.

    Layers that another process holds have `elsewhere` set.
    """
    if stage is None:
        return discover(model, **settings)
    with weights_elsewhere(stage.whole):
        found = discover(stage.whole, **settings)
        names = {id(module): name for name, module in base_modules(stage.whole)}
    here = dict(base_modules(model))
    held: list[LinearLayer | None] = []
    refused: dict[str, UnscoredModule] = {}
    for layer in found.layers:
        module = here.get(names[id(layer.module)])
        if module is None or plain_class(module) is not plain_class(layer.module):
            held.append(None)
            continue
        try:
            held.append(_here(layer, module))
        except Unsupported as error:
            refused[layer.name] = UnscoredModule(layer.name, plain_class(module).__name__, str(error))
            held.append(None)
    parts = stage.gathered([vars(item) for item in refused.values()])
    everywhere = [UnscoredModule(**item) for part in parts for item in part]
    gone = {item.name for item in everywhere}
    layers = [
        mine if mine is not None else replace(layer, elsewhere=True)
        for layer, mine in zip(found.layers, held, strict=True)
        if layer.name not in gone
    ]
    counts = stage.added([float(not layer.elsewhere) for layer in layers])
    missing = next((layer.name for layer, count in zip(layers, counts, strict=True) if count != 1), None)
    if missing is not None:
        raise InputError(f"`{missing}` is not on exactly one stage of the pipeline; score the model without `pp_size`")
    return replace(found, layers=tuple(layers), unscored=(*found.unscored, *everywhere))


def _here(layer: LinearLayer, module: nn.Module) -> LinearLayer:
    """Return a layer of the whole model with the module that this process holds."""
    adapter = adapter_for(module)
    if adapter is None:
        raise Unsupported("no adapter reads it")
    adapter.check(module)
    check_division(module, adapter)
    return replace(layer, module=module, adapter=adapter)


def held_here(layers: Sequence[LinearLayer]) -> list[LinearLayer]:
    """Return the layers whose modules this process holds."""
    return [layer for layer in layers if not layer.elsewhere]


def spread(layers: Sequence[LinearLayer], values: Sequence[float]) -> Iterator[float]:
    """Yield the values of the layers that this process holds in their places, and 0 for the others."""
    mine = iter(values)
    for layer in layers:
        yield 0.0 if layer.elsewhere else next(mine)
