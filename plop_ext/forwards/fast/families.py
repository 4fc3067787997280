"""The families of blocks that the fast path supports, and the pieces of a block."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from plop_ext.forwards.defined_in import is_defined_in
from plop_ext.forwards.fast.slots import replacement_of
from plop_ext.ops import FUSED_FLOATS, MAX_HEAD_DIM, MAX_NORM_FEATURES, NORMED_HEAD_DIMS, is_aligned

ROTARY = "apply_rotary_pos_emb"
_PACKAGE = "transformers.models."
# Hooks by which transformers returns the outputs of blocks; they change no value.
_CAPTURING = "transformers.utils.output_capturing"


class NotFast(Exception):
    """A block runs without the kernels; the text gives the reason."""


@dataclass(frozen=True)
class Family:
    """The composition of a block in a decoder family.

    Attributes:
        name: Prefix of the family's classes in transformers.
        title: Name of the family in prose.
        unit_offset: Norms store each weight minus 1.
        norms_before_adding: Outputs of attention and MLP are normed before they are added to the residual.
    """

    name: str
    title: str
    unit_offset: bool = False
    norms_before_adding: bool = False


FAMILIES = (
    Family("Llama", "Llama"),
    Family("Mistral", "Mistral"),
    Family("Qwen2", "Qwen2"),
    Family("Qwen3", "Qwen3"),
    Family("Gemma2", "Gemma 2", unit_offset=True, norms_before_adding=True),
    Family("Gemma3", "Gemma 3", unit_offset=True, norms_before_adding=True),
    Family("Phi3", "Phi-3"),
)
_BY_CLASS = {f"{family.name}DecoderLayer": family for family in FAMILIES}


def family_titles() -> str:
    """Return the list of families in prose, with which a test compares every such list."""
    *titles, last = (family.title for family in FAMILIES)
    return f"{', '.join(titles)} and {last}"


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over the hidden states or over a head."""

    module: Any
    eps: float

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight


@dataclass(frozen=True, eq=False)
class Block:
    """The pieces of one block.

    Attributes:
        module: The decoder layer.
        family: Its family.
        before_attention: The norm whose result attention reads.
        after_attention: The norm of attention's output, before it is added; None in families without.
        before_mlp: The norm whose result the MLP reads.
        after_mlp: The norm of the MLP's output, before it is added; None in families without.
        following: The norm that reads the block's output: that of the next known block, or the model's last; None if
            neither is there.
        head_norms: Norms of q and k over a head; None in families without.
        rotary_forward: The attention's forward, in whose code `apply_rotary_pos_emb` is a global name.
        gate_up: Gate and up projection, or the one module that is both.
        act: The MLP's activation.
        activation: Name of the activation for `ops.gated_activation_`.
        emitted: Linear layers whose outputs the fused kernels read.
        bypassed: Modules that a kernel includes, so that they are never called: inner norms, activation, dropout.
    """

    module: Any
    family: Family
    before_attention: Norm
    after_attention: Norm | None
    before_mlp: Norm
    after_mlp: Norm | None
    following: Norm | None
    head_norms: tuple[Norm, Norm] | None
    rotary_forward: Any
    gate_up: tuple[Any, ...]
    act: Any
    activation: str
    emitted: tuple[nn.Module, ...]
    bypassed: tuple[nn.Module, ...]


def find_blocks(model: nn.Module, owns: Callable[[Any], bool] = lambda hook: False) -> tuple[list[Block], list[str]]:
    """Return the supported blocks of `model`, and the reasons why other blocks of these families are not.

    Args:
        model: Any module.
        owns: Predicate: whether a forward hook belongs to the run.
    """
    blocks: list[Block] = []
    reasons: list[str] = []
    for parent in model.modules():
        for members in parent.children():
            if not isinstance(members, nn.ModuleList):
                continue
            known: list[Block | None] = []
            for module in members:
                family = family_of(module)
                try:
                    known.append(None if family is None else describe(module, family, owns))
                except NotFast as error:
                    known.append(None)
                    reasons.append(str(error))
            for block, after in pairwise((*known, None)):
                if block is None:
                    continue
                following = None if after is None else after.before_attention
                if block is known[-1]:
                    following = _last_norm(parent, block.family)
                blocks.append(replace(block, following=following))
    return blocks, reasons


def family_of(module: nn.Module) -> Family | None:
    """Return the family of a decoder layer, by its exact class, because a subclass may compute something else."""
    kind = type(module)
    return _BY_CLASS.get(kind.__name__) if is_transformers_class(kind) else None


def is_transformers_class(kind: type) -> bool:
    """Return whether a class belongs to a model of transformers."""
    return kind.__module__.startswith(_PACKAGE)


def describe(module: Any, family: Family, owns: Callable[[Any], bool]) -> Block:
    """Return the pieces of a decoder layer, without the following norm.

    Raises:
        NotFast: If a piece has another class than in the family, or was changed.
    """
    _check_code(type(module))
    attention = _piece(module, "self_attn", family, "Attention")
    mlp = _piece(module, "mlp", family, "MLP")
    _refuse_changes(module, owns)
    between = family.norms_before_adding
    rotary_forward = inspect.unwrap(type(attention).forward)
    if ROTARY not in rotary_forward.__code__.co_names or ROTARY not in rotary_forward.__globals__:
        raise NotFast(f"{type(attention).__name__} does not call {ROTARY} in this version of transformers")
    head_norms = None
    if hasattr(attention, "q_norm"):
        head_norms = (_norm(attention, "q_norm", family), _norm(attention, "k_norm", family))
        if head_norms[0].eps != head_norms[1].eps:
            raise NotFast("the norms of q and k differ in eps")
    gate_up = (mlp.gate_up_proj,) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj, mlp.up_proj)
    qk = (attention.qkv_proj,) if hasattr(attention, "qkv_proj") else (attention.q_proj, attention.k_proj)
    act = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn
    after_attention = _norm(module, "post_attention_layernorm", family) if between else None
    after_mlp = _norm(module, "post_feedforward_layernorm", family) if between else None
    within = [norm.module for norm in (after_attention, after_mlp, *(head_norms or ())) if norm is not None]
    dropouts = [child for child in module.children() if isinstance(child, nn.Dropout)]
    block = Block(
        module=module,
        family=family,
        before_attention=_norm(module, "input_layernorm", family),
        after_attention=after_attention,
        before_mlp=_norm(module, "pre_feedforward_layernorm" if between else "post_attention_layernorm", family),
        after_mlp=after_mlp,
        following=None,
        head_norms=head_norms,
        rotary_forward=rotary_forward,
        gate_up=gate_up,
        act=act,
        activation=_activation(act),
        emitted=tuple(linear for linear in (*qk, attention.o_proj, *gate_up, mlp.down_proj) if _emits(linear)),
        bypassed=(*within, act, *dropouts),
    )
    _check_sizes(block)
    return block


def _piece(parent: nn.Module, name: str, family: Family, kind: str) -> Any:
    """Return a child, checked to have the family's own class, because another class may compute something else."""
    found = parent._modules.get(name)
    wanted = f"{family.name}{kind}"
    if (type(found).__module__, type(found).__name__) != (type(parent).__module__, wanted):
        raise NotFast(f"`{name}` of a {type(parent).__name__} is a {type(found).__name__} and not a {wanted}")
    _check_code(type(found))
    return found


def _check_code(kind: type) -> None:
    """Raise if a class' forward is not transformers' own."""
    if not is_defined_in(kind.forward, "transformers"):  # type: ignore[attr-defined]
        raise NotFast(f"the forward of {kind.__name__} has been replaced")


def _norm(parent: nn.Module, name: str, family: Family) -> Norm:
    module = _piece(parent, name, family, "RMSNorm")
    if not (module.weight.is_contiguous() and is_aligned(module.weight)):
        raise NotFast(f"the weight of a {type(module).__name__} starts where the kernels cannot read it")
    return Norm(module, float(module.eps if hasattr(module, "eps") else module.variance_epsilon))


def _last_norm(parent: nn.Module, family: Family) -> Norm | None:
    """Return the model's norm after the last block; None if it is not the family's, or was changed."""
    try:
        norm = _norm(parent, "norm", family)
    except NotFast:
        return None
    return None if replacement_of(norm.module) is not None else norm


def _refuse_changes(block: nn.Module, owns: Callable[[Any], bool]) -> None:
    """Raise for a block in which code of other classes runs.

    A hook may modify a tensor in place before a kernel reads it, and a norm that is part of a kernel is never called.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise NotFast("there are hooks on all modules of the process")
    for module in block.modules():
        name = type(module).__name__
        if replacement_of(module) is not None or getattr(module, "_compiled_call_impl", None) is not None:
            raise NotFast(f"the forward of a {name} has been replaced")
        hooks = [hook for hook in module._forward_hooks.values() if not owns(hook) and not is_output_capturing(hook)]
        if hooks or module._forward_pre_hooks:
            raise NotFast(f"there is a hook on a {name}")


def is_output_capturing(hook: Any) -> bool:
    """Return whether transformers uses a forward hook to return the outputs of blocks."""
    return getattr(hook, "__module__", "") == _CAPTURING


def _emits(linear: Any) -> bool:
    """Return whether kernels may sum the output of a layer: it has to be a plain linear layer, without LoRA."""
    return type(linear) is nn.Linear and (linear.bias is None or is_aligned(linear.bias))


def _activation(act: Any) -> str:
    from transformers.activations import ACT2FN

    for name, ours in (("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh")):
        if type(act) is type(ACT2FN[name]):
            return ours
    raise NotFast(f"there is no kernel for the activation {type(act).__name__}")


def _check_sizes(block: Block) -> None:
    hidden = block.before_attention.weight.shape[0]
    if hidden % 8 or hidden > MAX_NORM_FEATURES:
        raise NotFast(f"hidden_size must be a multiple of 8, at most {MAX_NORM_FEATURES}, is {hidden}")
    inner = block.module.mlp.config.intermediate_size
    if inner % 8:
        raise NotFast(f"intermediate_size must be a multiple of 8, is {inner}")
    head_dim = block.module.self_attn.head_dim
    if head_dim % 16 or head_dim > MAX_HEAD_DIM or (block.head_norms and head_dim not in NORMED_HEAD_DIMS):
        raise NotFast(f"there is no kernel for heads of {head_dim}")
    dtype = block.before_attention.weight.dtype
    if dtype not in FUSED_FLOATS:
        raise NotFast(f"there are no kernels for {dtype}")
