"""Finds the linear layers of a model, and names every other weight that could have been one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from plop_ext.errors import InputError
from plop_ext.layers import linear  # noqa: F401  (registers its adapter)
from plop_ext.layers.adapter import LayerAdapter, Unsupported, adapter_for
from plop_ext.module_types import ModulePath, label_types, matches_suffix, module_path

# Weights of two and more dimensions that are no linear map of an activation.
_NOT_LINEAR = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class LinearLayer:
    """One module to score.

    Attributes:
        name: Full module name.
        type: Its type's label, unique in the model.
        layer: Index of the repeated block it sits in, or None.
        in_features: K.
        out_features: M.
        module: The module itself.
        adapter: How to read it.
    """

    name: str
    type: str
    layer: int | None
    in_features: int
    out_features: int
    module: nn.Module
    adapter: LayerAdapter


@dataclass(frozen=True)
class Unscored:
    """A weight that is not scored, and why.

    Attributes:
        name: Full module name.
        layer_class: Class of the module.
        reason: One phrase.
        wanted: Whether someone might miss it: False for layers left out by the default scope or by the user.
    """

    name: str
    layer_class: str
    reason: str
    wanted: bool


@dataclass(frozen=True)
class Discovery:
    """What `discover` found."""

    layers: tuple[LinearLayer, ...]
    unscored: tuple[Unscored, ...]


def discover(
    model: nn.Module, *, include: Sequence[str] | None = None, exclude: Sequence[str] = (), everything: bool = False
) -> Discovery:
    """Find the linear layers of `model`.

    By default only layers inside repeated blocks count, because heads and poolers (`lm_head`, `classifier`, `score`)
    are single layers, often freshly initialised, that LoRA placements leave alone; a model without repeated blocks
    gives all its linear layers.

    Args:
        model: Any module.
        include: Score exactly the layers whose name ends with one of these at a dot (PEFT's `target_modules` rule).
        exclude: Leave out the layers whose name ends with one of these at a dot.
        everything: Score heads too, as the published script does.

    Returns:
        The layers in the order of `named_modules`, and everything with a weight of two or more dimensions that is not
        among them, with the reason.

    Raises:
        InputError: If the model is LoRA-wrapped, has no linear layer to score, or a pattern matches nothing.
    """
    candidates: list[tuple[ModulePath, nn.Module, LayerAdapter]] = []
    unscored: list[Unscored] = []
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.tuners") and "lora_A" in dict(module.named_children()):
            raise InputError(
                f"`model` already carries LoRA adapters (at `{name}`); score the base model: `peft_model.unload()`"
            )
        adapter = adapter_for(module)
        if adapter is None:
            unscored += _weights_without_adapter(name, module)
            continue
        try:
            adapter.check(module)
        except Unsupported as error:
            unscored.append(Unscored(name, type(module).__name__, str(error), wanted=True))
            continue
        candidates.append((module_path(model, name), module, adapter))

    patterns_unused = {pattern for pattern in (*(include or ()), *exclude)}
    has_blocks = any(path.layer is not None for path, _, _ in candidates)
    has_blocks = has_blocks or any(module_path(model, item.name).layer is not None for item in unscored)
    in_blocks_only = has_blocks and not everything
    chosen = []
    for path, module, adapter in candidates:
        included = [pattern for pattern in include or () if matches_suffix(path.name, pattern)]
        excluded = [pattern for pattern in exclude if matches_suffix(path.name, pattern)]
        patterns_unused -= {*included, *excluded}
        reason = ""
        if excluded:
            reason = "excluded"
        elif include is not None:
            reason = "" if included else "not included"
        elif in_blocks_only and path.layer is None:
            reason = "outside the repeated blocks"
        if reason:
            unscored.append(Unscored(path.name, type(module).__name__, reason, wanted=False))
        else:
            chosen.append((path, module, adapter))
    if patterns_unused:
        known = ", ".join(sorted(set(label_types([path for path, _, _ in candidates])))) or "none"
        pattern = sorted(patterns_unused)[0]
        raise InputError(f"`{pattern}` in `include`/`exclude` matches no linear layer; there are {known}")
    if not chosen:
        seen = f"; not scored: {', '.join(sorted({item.layer_class for item in unscored}))}" if unscored else ""
        raise InputError(f"`model` ({type(model).__name__}) has no linear layer to score{seen}")

    labels = label_types([path for path, _, _ in chosen])
    layers = tuple(
        LinearLayer(path.name, label, path.layer, *adapter.features(module), module, adapter)
        for (path, module, adapter), label in zip(chosen, labels, strict=True)
    )
    return Discovery(layers, tuple(unscored))


def _weights_without_adapter(name: str, module: nn.Module) -> list[Unscored]:
    """The module's own matrices, if it has any that no adapter reads."""
    if isinstance(module, _NOT_LINEAR) or "embedding" in type(module).__name__.lower():
        return []
    weights = [key for key, parameter in module.named_parameters(recurse=False) if parameter.dim() >= 2]
    if not weights:
        return []
    reason = f"no adapter reads its class ({', '.join(weights)}); see plop_ext.layers.register_adapter"
    return [Unscored(name, type(module).__name__, reason, wanted=True)]
