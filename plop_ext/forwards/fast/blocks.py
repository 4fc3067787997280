"""The fused forwards of a block and its pieces."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from plop_ext.collecting.fused_sums import FusedSums
from plop_ext.forwards.fast import kernels
from plop_ext.forwards.fast.binding import Bindings
from plop_ext.forwards.fast.families import ROTARY, Block, Norm
from plop_ext.forwards.fast.kernel_audit import Audit
from plop_ext.forwards.fast.slots import replacement_of

# Number of vectors of sums that one block needs in the arena: the inputs and outputs of seven projections, of which q,
# k and v share one input, and gate and up another.
_VECTORS = 12


class Handover:
    """Results of norms that a kernel has already computed, until the model calls the norm.

    The norm is still called as a module. It returns the stored result only if its input is the same tensor that the
    kernel normed, and if the tensor was not modified since.
    """

    def __init__(self) -> None:
        self._waiting: dict[Any, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def put(self, norm: Norm, hidden: Tensor, normed: Tensor) -> None:
        self._waiting[norm.module] = (weakref.ref(hidden), hidden._version, normed)

    def take(self, norm: Norm, hidden: Tensor) -> Tensor | None:
        known, version, normed = self._waiting.pop(norm.module, (None, 0, None))
        return normed if known is not None and known() is hidden and hidden._version == version else None

    def clear(self) -> None:
        self._waiting.clear()


@dataclass
class Projections:
    """Whether `gated_projection` may run in blocks that are not being checked.

    Whether this kernel is eligible depends on batch and block. Therefore the batch on which the other kernels were
    checked may not have called it.

    Attributes:
        agreed: Whether the kernel was compared in this run, and agreed.
        wanted: Whether a block was eligible for the kernel, but `agreed` was false.
    """

    agreed: bool = False
    wanted: bool = False


class FusedBlock:
    """The fused forwards of a block, its attention, its MLP and its norms, bound to these modules.

    Args:
        block: The block.
        sums: The access to the collector's recording.
        handover: The results of norms, shared by the blocks of a model.
        projections: The permission for `gated_projection`, shared by the blocks of a model.
        bindings: The bindings to which the forwards are added.

    Attributes:
        audit: The comparison of the kernels, during a check.
        fused: Number of runs of the block with the kernels.
        plain: Number of runs without the kernels.
    """

    def __init__(
        self, block: Block, sums: FusedSums, handover: Handover, projections: Projections, bindings: Bindings
    ) -> None:
        self.block = block
        self.audit: Audit | None = None
        self.fused = self.plain = 0
        self._sums = sums
        self._handover = handover
        self._projections = projections
        self._bindings = bindings
        self._unit_offset = block.family.unit_offset
        self._parameters = tuple(inspect.signature(type(block.module).forward).parameters)[2:]  # self, hidden_states
        attention = block.module.self_attn
        bindings.add(block.module, self.forward)
        bindings.add(block.module.mlp, self.mlp_forward)
        for norm in (block.before_attention, block.before_mlp, block.following):
            if norm is not None:
                bindings.add(norm.module, self._norm_forward(norm))
        for norm in block.head_norms or ():  # part of the rotary kernel
            bindings.add(norm.module, _identity)
        # The family's own code, in which the global name `apply_rotary_pos_emb` refers to the kernel.
        code = block.rotary_forward
        names = {**code.__globals__, ROTARY: self.rotary}
        copied = types.FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
        copied.__kwdefaults__ = code.__kwdefaults__
        bindings.add(attention, types.MethodType(copied, attention))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        block, module = self.block, self.block.module
        if any(map(_is_observed, block.bypassed)):
            self.plain += 1
            with self._bindings.suspended():
                return type(module).forward(module, hidden_states, *args, **kwargs)
        if not self._runs_fused(module, hidden_states, block.before_attention):
            self.plain += 1
            return type(module).forward(module, hidden_states, *args, **kwargs)
        self.fused += 1
        emitter = self._sums.emitter(hidden_states)
        emitter.make_room(_VECTORS)
        kwargs |= zip(self._parameters, args, strict=False)
        with emitter.deferring(block.emitted):
            attended = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **kwargs)[0]
            hidden = self._add(attended, hidden_states, block.after_attention, block.before_mlp)
            hidden = self._add(module.mlp(block.before_mlp.module(hidden)), hidden, block.after_mlp, block.following)
            emitter.flush_deferred()
        return hidden

    def mlp_forward(self, x: Tensor) -> Tensor:
        """Run the MLP."""
        block, mlp = self.block, self.block.module.mlp
        if not self._runs_fused(mlp, x, block.before_mlp):
            return type(mlp).forward(mlp, x)
        if self._projects(x):
            emitter = self._sums.emitter(x)
            return mlp.down_proj(kernels.gated_projection(x, block.gate_up, block.activation, emitter, self.audit))
        projected = [linear(x) for linear in block.gate_up]
        gate, up = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
        if not kernels.takes_columns(gate, up, x):
            return mlp.down_proj(block.act(gate) * up)
        emitter = self._sums.emitter(x)
        product = kernels.gated_activation(gate, up, block.activation, emitter, self.audit)
        del gate, up, projected  # as the module releases them
        return mlp.down_proj(product)

    def rotary(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Replace `apply_rotary_pos_emb`, including head norms, for q and k [B, heads, T, D]."""
        norms = self.block.head_norms
        by_token = q.transpose(1, 2), k.transpose(1, 2)
        fits = kernels.takes_heads(*by_token, cos, sin) and (norms is None or norms[0].weight.dtype == q.dtype)
        if args or kwargs or not fits or not kernels.runs_fused(self.block.module, q):
            if norms is not None:
                q, k = (type(norm.module).forward(norm.module, x) for norm, x in zip(norms, (q, k), strict=True))
            original: Callable[..., tuple[Tensor, Tensor]] = self.block.rotary_forward.__globals__[ROTARY]
            self._sums.emitter(by_token[0].flatten(2)).flush_deferred()
            return original(q, k, cos, sin, *args, **kwargs)
        emitter = self._sums.emitter(by_token[0].flatten(2))
        q, k = kernels.rotary(*by_token, cos, sin, norms, self._unit_offset, emitter, self.audit)
        emitter.flush_deferred()  # v, whose sums no kernel takes, before attention needs the memory
        return q.transpose(1, 2), k.transpose(1, 2)

    def _projects(self, x: Tensor) -> bool:
        """Return whether a kernel replaces the projections of `x` to gate and up."""
        linears, projections = self.block.gate_up, self._projections
        if not (kernels.takes_weights(x, linears) and self._sums.bypassable(linears, x)):
            return False
        allowed = projections.agreed or self.audit is not None
        projections.wanted |= not allowed
        return allowed

    def _add(self, x: Tensor, residual: Tensor, inner: Norm | None, norm: Norm | None) -> Tensor:
        """Return residual + x, or residual + inner(x), and hand over its norm."""
        weights = [each.weight for each in (inner, norm) if each is not None]
        if norm is None or not kernels.takes(x, *weights) or not kernels.takes(residual, x):
            return residual + (x if inner is None else type(inner.module).forward(inner.module, x))
        emitter = self._sums.emitter(x)
        hidden, normed = kernels.add_norm(x, residual, norm, inner, self._unit_offset, emitter, self.audit)
        self._handover.put(norm, hidden, normed)
        return hidden

    def _norm_forward(self, norm: Norm) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            normed = self._handover.take(norm, x)
            if normed is not None:
                return normed
            if not self._runs_fused(norm.module, x, norm):
                return type(norm.module).forward(norm.module, x)
            emitter = self._sums.emitter(x)
            return kernels.add_norm(x, None, norm, None, self._unit_offset, emitter, self.audit)[1]

        return forward

    @staticmethod
    def _runs_fused(module: nn.Module, x: Tensor, norm: Norm) -> bool:
        return kernels.runs_fused(module, x) and kernels.takes(x, norm.weight)


def _is_observed(module: nn.Module) -> bool:
    """Return whether a hook or forward, which a kernel would bypass, was attached to a module since the run began."""
    changed = replacement_of(module) not in (None, _identity)
    return bool(module._forward_hooks or module._forward_pre_hooks) or changed


def _identity(x: Tensor) -> Tensor:
    return x
