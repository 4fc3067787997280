"""Models that compute the same without an attention mask as with a mask of ones."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from plop_ext.forwards.defined_in import is_defined_in
from plop_ext.forwards.fast.families import family_of, is_output_capturing, is_transformers_class

_ATTENTION = ("eager", "sdpa")


def may_omit_masks(model: nn.Module) -> bool:
    """Return whether the whole model computes the same without an attention mask as with a mask of ones.

    This holds for transformers' own models of the families in `plop_ext.forwards.fast.families`, bare or in a
    `PeftModel`, with attention by sdpa or eager.
    """
    if not runs_library_code(model):
        return False
    inner = _without_peft(model)
    blocks = [module for module in inner.modules() if family_of(module) is not None]
    return (
        bool(blocks)
        and all(_model_type(getattr(block, "self_attn", None)) == _model_type(inner) for block in blocks)
        and all(module.config._attn_implementation in _ATTENTION for module in inner.modules() if _is_model(module))
    )


def runs_library_code(model: nn.Module) -> bool:
    """Return whether only code of transformers, PEFT and torch sees the masks of a transformers model.

    Any other code that sees the mask may rely on an explicit all-ones mask: a wrapping model, a user-defined class,
    forward or hook, or a replaced mask function. Modules inside a block of a supported family see only the masks that
    transformers makes.
    """
    blocks = {module for module in model.modules() if family_of(module) is not None}
    within = {module for block in blocks for module in block.modules()}
    around = [
        module
        for module in model.modules()
        if module not in within
        and (_takes_mask(type(module)) or any(_is_model(inner) or inner in blocks for inner in module.modules()))
    ]
    return (
        _is_model(_without_peft(model))
        and not torch_module._global_forward_hooks
        and not torch_module._global_forward_pre_hooks
        and all(_is_unmodified(module) for module in around)
        and all(_makes_its_masks(module) for module in around if _is_model(module))
    )


def _is_model(module: Any) -> bool:
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    return kind is not None and isinstance(module, kind)


def _without_peft(model: nn.Module) -> Any:
    """Return the model in a `PeftModel`, by its class: other classes of PEFT forward attributes to the model."""
    unwrap = getattr(type(model), "get_base_model", None) if _is_of_peft(type(model)) else None
    return model if unwrap is None else unwrap(model)


def _is_of_peft(kind: type) -> bool:
    return kind.__module__.startswith("peft.")


def _model_type(module: Any) -> Any:
    return getattr(getattr(module, "config", None), "model_type", None)


def _takes_mask(kind: type[nn.Module]) -> bool:
    try:
        return "attention_mask" in inspect.signature(kind.forward).parameters
    except (AttributeError, TypeError, ValueError):  # as of a scripted module
        return False


def _is_unmodified(module: nn.Module) -> bool:
    """Return whether only transformers', PEFT's or torch's own code sees the arguments of the module."""
    kind = type(module)
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if "forward" in vars(module) or not all(map(is_output_capturing, hooks)):
        return False
    if kind is nn.ModuleList:
        return True
    package = "transformers" if is_transformers_class(kind) else "peft" if _is_of_peft(kind) else None
    is_called_as_made = kind.__call__ is nn.Module.__call__ or is_defined_in(kind.__call__, "transformers")
    return package is not None and is_called_as_made and is_defined_in(kind.forward, package)


def _makes_its_masks(model: Any) -> bool:
    """Return whether transformers' own functions make the masks of a transformers model."""
    names = vars(sys.modules[type(model).__module__])
    makers = [value for name, value in names.items() if name.startswith("create_") and "mask" in name]
    attention = model.config._attn_implementation
    known = getattr(sys.modules.get("transformers.masking_utils"), "ALL_MASK_ATTENTION_FUNCTIONS", {})
    if attention is not None:  # None for a model without attention
        if attention not in known:  # it receives the unchanged mask
            return False
        makers.append(known[attention])
    return all(is_defined_in(maker, "transformers") for maker in makers)
