"""Find the linear layers of a model, and report all other modules with a weight of two or more dimensions."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from plop_ext.errors import InputError

# Each import registers adapters, in any order.
from plop_ext.layers import conv, experts, grouped, linear, opaque, own_forward, quantized  # noqa: F401
from plop_ext.layers.adapter import LayerAdapter, Part, Unsupported, adapter_for
from plop_ext.layers.attributes import attribute, tensor
from plop_ext.layers.experts import ExpertsAdapter
from plop_ext.layers.no_place import SINGLE_OUTPUT, reason_against
from plop_ext.layers.packed_weights import split_for
from plop_ext.layers.roles import Traits, roles_of
from plop_ext.layers.routers import ROUTER, is_router, is_router_class
from plop_ext.layers.scope import LANGUAGE, parts_with, scope_of
from plop_ext.layers.sharded import division_of, shapes_known
from plop_ext.layers.split import Split
from plop_ext.layers.streams import TEXT, ModelStreams
from plop_ext.layers.targets import Adaptable, lora_targets
from plop_ext.layers.unread import UNREAD, unread_blocks
from plop_ext.layers.walk import base_model, base_modules, plain_class
from plop_ext.lora_target import LoraTarget
from plop_ext.module_types import ModulePath, as_patterns, label_types, module_path, suffixes, with_role
from plop_ext.unscored import UnscoredModule

# Modules whose weights of two and more dimensions are not linear maps of an activation.
_NOT_LINEAR = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm)
# Attribute names of a linear layer's sizes. Only in such a layer may buffers be codes of its weight.
_SIZES = (("in_features", "out_features"), ("infeatures", "outfeatures"))
# Parameters of two dimensions that are not weights of a matrix product.
_STATE_SPACE = {"A_log"}


@dataclass(frozen=True)
class LinearLayer:
    """One logical matrix to score: a module, a part of a packed one, or one expert's projection.

    Attributes:
        name: Full name of the module, followed by the name of the part if the weight is packed.
        type: Label of the module type, unique in the model.
        layer: Index of the repeated block that holds the module, or None outside the blocks.
        in_features: K.
        out_features: M.
        module: The module; the parts of a packed weight share it.
        adapter: Adapter that reads W, inputs and outputs.
        target: Module or parameter that PEFT adapts for this matrix.
        part: Index of the matrix among the parts of the module.
        split: Layout of the module's outputs if the weight is packed, else None.
        stream: Stream of rows in which the module sits (`plop_ext.layers.streams`).
        no_place: Why the matrix is no place for LoRA; empty if it is a candidate.
        elsewhere: Whether another process holds the module: another stage of a pipeline.
    """

    name: str
    type: str
    layer: int | None
    in_features: int
    out_features: int
    module: nn.Module
    adapter: LayerAdapter
    target: LoraTarget
    part: int = 0
    split: Split | None = None
    stream: str = TEXT
    no_place: str = ""
    elsewhere: bool = False


@dataclass(frozen=True)
class Discovery:
    """What `discover` found.

    Attributes:
        layers: The layers to score.
        unscored: All other modules with a weight of two or more dimensions.
        scope: Part of the model that was searched: that asked for, or another one of a model without language.
    """

    layers: tuple[LinearLayer, ...]
    unscored: tuple[UnscoredModule, ...]
    scope: str = LANGUAGE


@dataclass(frozen=True)
class _Candidate:
    """A part of a module, with the path that defines its type."""

    path: ModulePath
    name: str
    type_suffix: str
    module: nn.Module
    adapter: LayerAdapter
    part: Part
    index: int
    split: Split | None
    ancestry: tuple[tuple[str, str], ...]
    config: object

    @property
    def no_place(self) -> str:
        """Why the matrix is no place for LoRA; empty if it is one."""
        single = self.path.layer is not None and self.part.out_features == 1
        return reason_against(self.ancestry) or (SINGLE_OUTPUT if single else "")

    @property
    def traits(self) -> Traits:
        """What tells the roles of the type's path apart."""
        inside = max(1, self.path.in_block.count("."))
        kinds: Any = getattr(self.config, "layer_types", None)
        layer = self.path.layer
        return Traits(
            self.path.type_path + self.part.type_suffix,
            tuple(owner for owner, _ in self.ancestry[-inside:]),
            (self.part.in_features, self.part.out_features),
            str(kinds[layer]) if isinstance(kinds, (list, tuple)) and layer is not None and layer < len(kinds) else "",
        )

    def named_by(self, patterns: Collection[str]) -> set[str]:
        """Return the patterns that name the module, the part of a packed module, or the projection of experts."""
        names = {self.path.name, self.path.name + self.part.type_suffix} if patterns else ()
        return {suffix for name in names for suffix in suffixes(name) if suffix in patterns}


def discover(
    model: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    scope: str = "language",
    everything: bool = False,
) -> Discovery:
    """Find the linear layers of `model`.

    By default only layers inside repeated blocks are found, because heads and poolers (`lm_head`, `classifier`,
    `score`) are single layers, often freshly initialized, to which LoRA is not applied. In a model without repeated
    blocks, all linear layers are found. In a model with LoRA adapters, the base layers are found, under their names
    without adapters.

    The layers of the table in `plop_ext.layers.no_place`, and those of blocks that the model does not read, are found
    too, with the reason why they are no place for LoRA. Layers that `include` names are candidates all the same.

    Args:
        model: Any module.
        include: Score exactly the layers whose name ends with one of these at a dot (PEFT's `target_modules` rule).
            Name a part as `qkv_proj.q` and experts as `experts.up_proj`, or either by the module's name.
        exclude: Do not score the layers whose name ends with one of these at a dot.
        scope: Part of a multimodal model: `"language"`, `"vision"`, `"audio"` or `"all"`. In a model without a
            language part, the default is the part that it has. Ignored for layers that `include` names.
        everything: Score the layers of the published script: every `nn.Linear`, including heads, packed weights as
            one matrix.

    Returns:
        The layers in the order of `named_modules`, and all other modules with a weight of two or more dimensions, with
        the reason.

    Raises:
        InputError: If the model has no linear layer to score, a pattern matches nothing, or it has no such scope.
    """
    include = None if include is None else as_patterns(include, "include")
    exclude = as_patterns(exclude, "exclude")
    if include == ():
        raise InputError("`include` is empty; name what to score, or leave it out to score all")
    modules = tuple(base_modules(model))
    lists = {name for name, module in modules if isinstance(module, nn.ModuleList)}
    in_scope = scope_of(model, scope)
    with closing(_with_shapes(modules)) as visited:
        candidates, unscored = _candidates(visited, lists, linear_only=everything)
    wanted, unwanted = frozenset(include or ()), frozenset(exclude)
    patterns_unused = {*wanted, *unwanted}
    paths = [candidate.path for candidate in candidates]
    has_blocks = any(path.layer is not None for path in paths)
    has_blocks = has_blocks or any(module_path(item.name, lists).layer is not None for item in unscored)
    in_blocks_only = has_blocks and not everything
    searched = [path.name for path in paths if path.layer is not None or not in_blocks_only]
    if scope == LANGUAGE and include is None and searched and not any(map(in_scope, searched)):
        scope = parts_with(model, searched)
        in_scope = scope_of(model, scope)
    chosen: list[_Candidate] = []
    left_out: dict[str, UnscoredModule] = {}
    for candidate in candidates:
        name = candidate.path.name
        included, excluded = candidate.named_by(wanted), candidate.named_by(unwanted)
        patterns_unused -= included | excluded
        reason = ""
        if excluded:
            reason = "excluded"
        elif include is not None:
            reason = "" if included else "not included"
        elif not in_scope(name):
            reason = f'not in scope="{scope}"'
        elif in_blocks_only and candidate.path.layer is None:
            reason = "outside the repeated blocks"
        if not reason:
            chosen.append(candidate)
        else:
            whole = candidate.name if candidate.split is not None else name
            left_out[whole] = UnscoredModule(whole, plain_class(candidate.module).__name__, reason, wanted=False)
    unscored = [item if in_scope(item.name) else replace(item, wanted=False) for item in unscored]
    unscored += left_out.values()
    if patterns_unused:
        known = ", ".join(sorted(set(label_types(paths)))) or "none"
        pattern = sorted(patterns_unused)[0]
        raise InputError(f"`{pattern}` in `include`/`exclude` matches no linear layer; there are {known}")
    if not chosen:
        raise InputError(f"`model` ({type(model).__name__}) has no linear layer to score{_not_scored(unscored)}")

    judged = include is None and not everything
    unread = unread_blocks(modules)
    no_place = [
        candidate.no_place or (UNREAD if candidate.name.startswith(unread) else "") if judged else ""
        for candidate in chosen
    ]
    if all(no_place):
        raise InputError(
            f"`model` ({type(model).__name__}) has no linear layer for LoRA; `{chosen[0].name}`: {no_place[0]}; name "
            "in `include` what to score"
        )
    matrices = [Adaptable(found.path.name, found.module, found.adapter, found.index) for found in chosen]
    targets = lora_targets(base_model(model), modules, matrices)
    if judged:
        # What PEFT cannot adapt takes no place of the others. If that is all, it competes, for another trainer.
        adaptable = [reason or target.refused for reason, target in zip(no_place, targets, strict=True)]
        no_place = no_place if all(adaptable) else adaptable
    labels = label_types([_type_path(candidate) for candidate in chosen])
    stream = ModelStreams(model)
    roles = roles_of([candidate.traits for candidate in chosen])
    layers = tuple(
        LinearLayer(
            candidate.name,
            with_role(label + (candidate.type_suffix if candidate.split is not None else ""), role),
            candidate.path.layer,
            candidate.part.in_features,
            candidate.part.out_features,
            candidate.module,
            candidate.adapter,
            target,
            candidate.index,
            candidate.split,
            stream(candidate.path.name),
            reason,
        )
        for candidate, label, role, target, reason in zip(chosen, labels, roles, targets, no_place, strict=True)
    )
    return Discovery(layers, tuple(unscored), scope)


def _with_shapes(modules: Iterable[tuple[str, nn.Module]]) -> Generator[tuple[str, nn.Module]]:
    """Yield each module while its weights have their own shapes."""
    for name, module in modules:
        with shapes_known(module):
            yield name, module


def _candidates(
    modules: Iterable[tuple[str, nn.Module]], lists: Collection[str], linear_only: bool
) -> tuple[list[_Candidate], list[UnscoredModule]]:
    """Return every part of every module that an adapter reads, and the modules with a matrix that none reads."""
    candidates: list[_Candidate] = []
    unscored: list[UnscoredModule] = []
    seen: dict[int, str] = {}
    configs: dict[str, object] = {}
    classes: dict[str, str] = {}
    for name, module in modules:
        parent = name.rpartition(".")[0]
        classes[name] = plain_class(module).__name__
        configs[name] = attribute(module, "config") or configs.get(parent)
        adapter = adapter_for(module)
        if id(module) in seen:
            if adapter is not None:
                unscored.append(
                    UnscoredModule(
                        name, plain_class(module).__name__, f"the same module as `{seen[id(module)]}`", wanted=False
                    )
                )
            continue
        seen[id(module)] = name
        if adapter is None:
            unscored += _weights_without_adapter(name, module)
            continue
        if is_router_class(module):  # some are an `nn.Linear` that returns a tuple
            unscored.append(UnscoredModule(name, plain_class(module).__name__, ROUTER, wanted=False))
            continue
        if "experts" in name.split(".")[:-1]:
            reason = "an expert with a module of its own: its rows do not tell which sample they are from"
            unscored.append(UnscoredModule(name, plain_class(module).__name__, reason))
            continue
        if linear_only and not isinstance(module, nn.Linear):
            unscored.append(
                UnscoredModule(
                    name, plain_class(module).__name__, "the published script reads nn.Linear only", wanted=False
                )
            )
            continue
        try:
            adapter.check(module)
            check_division(module, adapter)
        except Unsupported as error:
            unscored.append(UnscoredModule(name, plain_class(module).__name__, str(error)))
            continue
        path = module_path(name, lists)
        split = None
        if not linear_only and not isinstance(adapter, ExpertsAdapter):
            out_features = adapter.features(module)[1]
            if is_router(name, out_features, configs.get(parent)):
                unscored.append(UnscoredModule(name, plain_class(module).__name__, ROUTER, wanted=False))
                continue
            split = split_for(configs.get(parent), name, out_features)
        ancestry, config = _ancestry(name, classes), configs.get(parent)
        candidates += [
            _Candidate(
                path, name + part.suffix, part.type_suffix, module, adapter, part, index, split, ancestry, config
            )
            for index, part in enumerate(adapter.parts(module, split))
        ]
    return candidates, unscored


def check_division(module: nn.Module, adapter: LayerAdapter) -> None:
    """Raise `Unsupported` if the weight is divided in the forward and the module cannot be scored so."""
    division = division_of(module)
    if isinstance(division, str):
        raise Unsupported(division)
    if division is not None and not adapter.divisible:
        raise Unsupported(
            f"tensor parallelism divides its weight, and its kind ({adapter.kind}) is scored whole; score the model "
            "before it is divided"
        )


def _ancestry(name: str, classes: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return each step from the model to a module: the name of a class, and the attribute that leads on."""
    parts = name.split(".")
    return tuple((classes[".".join(parts[:depth])], part) for depth, part in enumerate(parts))


def _type_path(candidate: _Candidate) -> ModulePath:
    """Return the path that names the type: with the projection of an expert, without the part of a packed weight."""
    if candidate.split is not None or not candidate.type_suffix:
        return candidate.path
    suffix = candidate.type_suffix
    path = candidate.path
    return ModulePath(candidate.name, path.layer, path.type_path + suffix, path.in_block + suffix)


def _not_scored(unscored: Sequence[UnscoredModule]) -> str:
    """Return the classes of the modules that are not scored, each with its first reason, for an error."""
    reasons: dict[str, str] = {}
    for item in sorted(unscored, key=lambda item: (item.layer_class, not item.wanted)):
        reasons.setdefault(item.layer_class, item.reason)
    return f"; not scored: {', '.join(f'{name} ({reason})' for name, reason in reasons.items())}" if reasons else ""


def _weights_without_adapter(name: str, module: nn.Module) -> list[UnscoredModule]:
    """Return the module's own matrices, if it has any that no adapter reads."""
    if isinstance(module, _NOT_LINEAR) or _is_transformers_embedding(module):
        return []
    parametrized: Any = module._modules.get("parametrizations") or ()
    names = [*(key for key, _ in module.named_parameters(recurse=False)), *parametrized]
    if any(all(attribute(module, size) is not None for size in sizes) for sizes in _SIZES):
        names += [key for key, _ in module.named_buffers(recurse=False)]
    tensors = ((key, tensor(module, key)) for key in names)
    weights = [key for key, found in tensors if found is not None and found.dim() >= 2]
    if not weights:
        return []
    if weights == ["weight"] and is_router_class(module):
        return [UnscoredModule(name, plain_class(module).__name__, ROUTER, wanted=False)]
    if _STATE_SPACE.issuperset(weights):
        return [UnscoredModule(name, plain_class(module).__name__, "the decay rates of a state space", wanted=False)]
    reason = f"no adapter reads its class ({', '.join(weights)}); see plop_ext.layers.register_adapter"
    return [UnscoredModule(name, plain_class(module).__name__, reason)]


def _is_transformers_embedding(module: nn.Module) -> bool:
    """Return whether the module is one of transformers' embeddings: tables, positions and class tokens."""
    kind = plain_class(module)
    return kind.__module__.startswith("transformers.") and "embedding" in kind.__name__.lower()
