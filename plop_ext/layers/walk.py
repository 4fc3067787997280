"""The modules of a model under their plain names: those of the model without adapters and without wrappers.

Wrappers come and go between scoring and training: DDP, FSDP, `torch.compile`, activation checkpointing, PEFT. A name
must denote the same module in all of them, so every component takes its names from here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

# Children by which wrappers hold the module that they wrap: `torch.compile`, FSDP 1, activation checkpointing and
# offload, Lightning Fabric, fairscale.
_WRAPPED = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_fpw_module",
)
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_PASSES_ON = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers; `model` itself if there is none.

    A module around a single model counts as a wrapper too: it holds one model of transformers, and beside it at most
    heads, without blocks of their own; or its only child with parameters gets any arguments (`*args`, `**kwargs`).
    PEFT matches a full name as a suffix, so the shorter names fit the wrapper as well.
    """
    model = _chain(model)[-1]
    inner = None if _is_whole(model) else _only_model(model)
    return model if inner is None else base_model(inner)


def runnable(model: nn.Module) -> nn.Module:
    """Return the model without wrappers that change no output: `torch.compile` and data parallelism.

    Compiled code runs no hooks that were added later, and data parallelism would run replicas of the hooked modules.
    """
    inner = model.module if isinstance(model, _PARALLEL) else model._modules.get("_orig_mod")
    return model if inner is None else runnable(inner)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) in the order of `named_modules`, without wrappers and adapters.

    A module with several names is yielded once per name; `discover` keeps the first.
    """
    for name, chain in wrapped_modules(model):
        yield name, chain[-1]


def wrapped_modules(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield (name, chain) as `base_modules`; the chain holds the wrappers of the module, outermost first, and it."""
    yield from _visit(base_model(model), "", frozenset())


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's own class: `fully_shard` replaces it by a subclass with another name."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.distributed."))


def _visit(module: nn.Module, name: str, above: frozenset[int]) -> Iterator[tuple[str, list[nn.Module]]]:
    chain = _chain(module)
    layer = chain[-1]
    if id(layer) in above:
        return
    yield name, chain
    for child_name, child in layer._modules.items():
        # The originals of parametrized weights are not modules of the model: the weight is an attribute of `layer`.
        if child is not None and child_name != "parametrizations":
            yield from _visit(child, f"{name}.{child_name}" if name else child_name, above | {id(layer)})


def _chain(module: nn.Module) -> list[nn.Module]:
    """Return the module, the module that it wraps, and so on."""
    chain = [module]
    while (inner := _wrapped(chain[-1])) is not None:
        chain.append(inner)
    return chain


def _wrapped(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper of torch, PEFT or a trainer wraps; None for any other module."""
    if isinstance(module, _PARALLEL):
        return module.module
    if plain_class(module).__module__.split(".", 1)[0] == "peft":
        return _without_adapter(module)
    return next((inner for name in _WRAPPED if (inner := module._modules.get(name)) is not None), None)


def _without_adapter(module: Any) -> nn.Module | None:
    """Return what a class of PEFT adapts: a model, a layer, or a parameter's module, which may be adapted again."""
    if hasattr(module, "get_base_model"):
        return module.get_base_model()
    inner = (module._modules.get(name) for name in ("base_layer", "original_module"))
    return next((found for found in inner if found is not None), None)


def _only_model(module: nn.Module) -> nn.Module | None:
    """Return the single model that a module holds, if that is all but heads, or None."""
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    whole = [child for child in children if _is_whole(base_model(child))]
    if len(whole) == 1 and not any(_has_blocks(child) for child in children if child is not whole[0]):
        return whole[0]
    alone = len(children) == 1 and next(module.parameters(recurse=False), None) is None
    passes_on = all(value.kind in _PASSES_ON for value in _parameters(module))
    return children[0] if alone and passes_on else None


def _has_blocks(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.ModuleList) and len(inner) for inner in module.modules())


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """Return the parameters of the forward that the module's class defines, without `self`."""
    if type(module).forward is nn.Module.forward:  # a container
        return [inspect.Parameter("input", inspect.Parameter.POSITIONAL_ONLY)]
    return list(inspect.signature(type(module).forward).parameters.values())[1:]


def _is_whole(module: nn.Module) -> bool:
    """Return whether the module is a model of transformers, whose names are those that users know."""
    return hasattr(getattr(module, "config", None), "model_type")
