"""Which blocks the fast path knows, and what each is made of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from plop_ext.ops import FUSED_FLOATS, MAX_HEAD_DIM, MAX_NORM_FEATURES

ROTARY = "apply_rotary_pos_emb"
_PACKAGE = "transformers.models."


class NotFast(Exception):
    """A block stays as it is; the text says why."""


@dataclass(frozen=True)
class Family:
    """How a decoder family composes a block.

    Attributes:
        name: Prefix of its classes in transformers.
        unit_offset: Its norms store weights as their distance from 1.
        norms_before_adding: Outputs of attention and MLP are normed before they are added to the residual.
    """

    name: str
    unit_offset: bool = False
    norms_before_adding: bool = False


_FAMILIES = {
    f"{family.name}DecoderLayer": family
    for family in (
        Family("Llama"),
        Family("Mistral"),
        Family("Qwen2"),
        Family("Qwen3"),
        Family("Phi3"),
        Family("Gemma2", unit_offset=True, norms_before_adding=True),
        Family("Gemma3", unit_offset=True, norms_before_adding=True),
    )
}


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
        following: The norm that reads the block's output: the next block's first or the model's last; None: unknown.
        head_norms: Norms of q and k over a head; None in families without.
        rotary_forward: The attention's forward, in whose code `apply_rotary_pos_emb` is a global name.
        activation: Of the MLP, as `ops.gated_activation_` names it.
        emitted: Linear layers whose outputs the fused kernels read.
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
    activation: str
    emitted: tuple[nn.Module, ...]


def find_blocks(model: nn.Module) -> tuple[list[Block], list[str]]:
    """The blocks of `model` that the fast path knows, and why each of the others of these families is left out."""
    blocks: list[Block] = []
    reasons: list[str] = []
    for parent in model.modules():
        for members in parent.children():
            if not isinstance(members, nn.ModuleList):
                continue
            for index, module in enumerate(members):
                family = family_of(module)
                if family is None:
                    continue
                after = members[index + 1] if index + 1 < len(members) else parent
                try:
                    blocks.append(describe(module, family, after))
                except NotFast as error:
                    reasons.append(str(error))
    return blocks, reasons


def family_of(module: nn.Module) -> Family | None:
    """The family of a decoder layer, by its very class: a subclass may compute anything."""
    kind = type(module)
    return _FAMILIES.get(kind.__name__) if kind.__module__.startswith(_PACKAGE) else None


def describe(module: Any, family: Family, after: Any) -> Block:
    """The pieces of a decoder layer.

    Args:
        module: The decoder layer.
        family: Its family.
        after: What holds the norm of the block's output: the next decoder layer, or the model.

    Raises:
        NotFast: If a piece is not what the family is made of, or has been changed.
    """
    attention, mlp = module.self_attn, module.mlp
    for piece in _pieces(module):
        if "forward" in vars(piece):
            raise NotFast(f"the forward of a {type(piece).__name__} has been replaced")
    before_mlp = module.pre_feedforward_layernorm if family.norms_before_adding else module.post_attention_layernorm
    after_attention = module.post_attention_layernorm if family.norms_before_adding else None
    after_mlp = module.post_feedforward_layernorm if family.norms_before_adding else None
    following = getattr(after, "input_layernorm" if isinstance(after, type(module)) else "norm", None)
    rotary_forward = inspect.unwrap(type(attention).forward)
    if ROTARY not in rotary_forward.__code__.co_names or ROTARY not in rotary_forward.__globals__:
        raise NotFast(f"{type(attention).__name__} does not call {ROTARY} in this version of transformers")
    for norm in (after_attention, after_mlp):
        _refuse_hooks(norm)
    head_norms = None
    if hasattr(attention, "q_norm"):
        head_norms = (_norm(attention.q_norm, family), _norm(attention.k_norm, family))
        if head_norms[0].eps != head_norms[1].eps:
            raise NotFast("the norms of q and k differ in eps")
        for norm in head_norms:
            _refuse_hooks(norm.module)
    gate_up = (mlp.gate_up_proj,) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj, mlp.up_proj)
    qk = (attention.qkv_proj,) if hasattr(attention, "qkv_proj") else (attention.q_proj, attention.k_proj)
    linears = (*qk, attention.o_proj, *gate_up, mlp.down_proj)
    block = Block(
        module=module,
        family=family,
        before_attention=_norm(module.input_layernorm, family),
        after_attention=None if after_attention is None else _norm(after_attention, family),
        before_mlp=_norm(before_mlp, family),
        after_mlp=None if after_mlp is None else _norm(after_mlp, family),
        following=None if following is None else _norm(following, family),
        head_norms=head_norms,
        rotary_forward=rotary_forward,
        activation=_activation(mlp),
        # Of any other class the hook may score something else than the output, such as a base layer's under LoRA.
        emitted=tuple(linear for linear in linears if type(linear) is nn.Linear),
    )
    _check_sizes(block)
    return block


def _pieces(module: Any) -> Iterator[nn.Module]:
    """What the fast path takes over of a decoder layer: all but the linear layers and the activation."""
    yield module
    yield module.self_attn
    yield module.mlp
    for parent in (module, module.self_attn):
        yield from (child for child in parent.children() if type(child).__name__.endswith("RMSNorm"))


def _norm(module: Any, family: Family) -> Norm:
    if type(module).__name__ != f"{family.name}RMSNorm":
        raise NotFast(f"a norm of a {family.name} block is a {type(module).__name__}")
    return Norm(module, float(module.eps if hasattr(module, "eps") else module.variance_epsilon))


def _refuse_hooks(module: nn.Module | None) -> None:
    """A norm that is part of a fused kernel is never called, so hooks on it would not fire."""
    if module is not None and (module._forward_hooks or module._forward_pre_hooks):
        raise NotFast(f"a hook on a {type(module).__name__} needs the norm by itself")


def _activation(mlp: Any) -> str:
    from transformers.activations import ACT2FN

    function = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn
    for name, ours in (("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh")):
        if type(function) is type(ACT2FN[name]):
            _refuse_hooks(function)
            return ours
    raise NotFast(f"there is no kernel for the activation {type(function).__name__}")


def _check_sizes(block: Block) -> None:
    hidden = block.before_attention.weight.shape[0]
    if hidden % 8 or hidden > MAX_NORM_FEATURES:
        raise NotFast(f"hidden_size must be a multiple of 8, at most {MAX_NORM_FEATURES}, is {hidden}")
    inner = block.module.mlp.down_proj.in_features
    if inner % 8:
        raise NotFast(f"intermediate_size must be a multiple of 8, is {inner}")
    head_dim = block.module.self_attn.head_dim
    units = head_dim // 16
    if head_dim % 16 or head_dim > MAX_HEAD_DIM or (block.head_norms is not None and units & (units - 1)):
        raise NotFast(f"there is no kernel for heads of {head_dim}")
    dtype = block.before_attention.weight.dtype
    if dtype not in FUSED_FLOATS:
        raise NotFast(f"there are no kernels for {dtype}")
