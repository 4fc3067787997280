"""The grouped forward of stacked experts, as in transformers, with the sums of squares of z and W z of every expert.

transformers lets a model run its experts by a registered function (`ALL_EXPERTS_FUNCTIONS`). The function here sorts
the rows by expert and multiplies them as transformers' own `grouped_mm` does, up to rounding. In addition, it adds the
sums of squares of each projection to the totals per expert and sample. Offsets stay on the device, so nothing
synchronizes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from plop_ext import ops
from plop_ext.collecting.arena import Arena
from plop_ext.collecting.token_map import BatchTokens, Reading
from plop_ext.layers import LinearLayer
from plop_ext.layers.experts import ExpertsAdapter
from plop_ext.layers.parametrized import base_weight

IMPLEMENTATION = "plop_ext"

# Called with hidden states [T, H], token [S] and expert [S] of each row; None: this call does not count.
Observer: TypeAlias = "Callable[[Tensor, Tensor, Tensor], RoutedCall | None]"

# The observer of each module.
_OBSERVERS: weakref.WeakKeyDictionary[nn.Module, Observer] = weakref.WeakKeyDictionary()


class RoutedCall:
    """Sums of squares of one call of an experts module.

    Rows are the (token, expert) pairs, sorted by expert, and for each expert by token, hence also by sample.

    Args:
        arena: The arena with the totals.
        first_rows: Row in the totals of each projection's first expert; None for a projection that is not scored.
        tokens: The batch.
        reading: What the module reads.
        hidden: [T, H] input, all tokens.
        token: [S] token of each row.
        expert: [S] expert of each row, ascending; ids past the last expert mark rows that are not computed.
        experts: E.
        phase: First row read; that of `tokens` unless the rows of other experts come before these.
    """

    def __init__(
        self,
        arena: Arena,
        first_rows: Sequence[int | None],
        tokens: BatchTokens,
        reading: Reading,
        hidden: Tensor,
        token: Tensor,
        expert: Tensor,
        experts: int,
        phase: int | None = None,
    ) -> None:
        phase = tokens.phase if phase is None else phase
        samples, counted = tokens.owners(reading, hidden.device)
        self._arena = arena
        self._first_rows = first_rows
        self._step, self._phase = tokens.step, phase
        self._rows = ops.rows_read(len(token), tokens.step, phase)
        cells = experts * tokens.samples
        cell = expert * tokens.samples + samples[token]
        offsets = torch.searchsorted(cell, torch.arange(cells + 1, device=cell.device))
        self._offsets = ((offsets - phase + tokens.step - 1) // tokens.step).clamp_(min=0)
        token_read = token[phase :: tokens.step]
        self._counted = counted[token_read]
        self._sums = torch.empty((len(first_rows) + 2) * self._rows, dtype=arena.dtype, device=hidden.device)
        self._records: list[int] = []
        # The input of the first projections, once per token and not once per row.
        per_token = torch.empty(len(hidden), dtype=arena.dtype, device=hidden.device)
        ops.row_sumsq_(per_token, hidden.detach())
        torch.index_select(per_token, 0, token_read, out=self._sums[: self._rows])
        self._in_start = 0
        self._used = self._rows

    def input(self, z: Tensor) -> None:
        """Sum the input [S, K] of the following outputs."""
        self._in_start = self._used
        ops.row_sumsq_(self._take(), z.detach(), None, self._step, self._phase)

    def output(self, projection: int, y: Tensor, split: Any = None, part: int = 0) -> None:
        """Sum the output [S, M] of one projection, without its bias."""
        row = self._first_rows[projection]
        if row is None:
            return
        y = y.detach()
        if split is not None:
            y = split.select(y, part)
            y = y.squeeze(2) if y.shape[2] == 1 else y.squeeze(1)
        start = self._used
        ops.row_sumsq_(self._take(), y, None, self._step, self._phase)
        self._records += (row, self._in_start, start)

    def finish(self) -> None:
        self._arena.add_routed(self._sums, self._counted, self._offsets, self._records)

    def _take(self) -> Tensor:
        self._used += self._rows
        return self._sums[self._used - self._rows : self._used]


@contextmanager
def observed(modules: Mapping[nn.Module, Observer]) -> Iterator[str | None]:
    """Run `modules` by the observed forward within the block; each call asks its observer for a `RoutedCall`.

    Yields:
        The model's own implementation, which is restored afterwards; None without modules.
    """
    if not modules:
        yield None
        return
    from transformers.integrations import moe

    moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    before: list[tuple[Any, str | None]] = []
    try:
        for config in configs.values():
            before.append((config, config._experts_implementation))
            config._experts_implementation = IMPLEMENTATION
        _OBSERVERS.update(modules)
        yield before[0][1] or "eager"
    finally:
        for module in modules:
            _OBSERVERS.pop(module, None)
        for config, implementation in before:
            config._experts_implementation = implementation


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run an experts module like transformers' `grouped_mm_experts_forward`, observed.

    Args:
        self: The experts module.
        hidden_states: [T, H].
        top_k_index: [T, k] expert of each choice.
        top_k_weights: [T, k].

    Returns:
        [T, H], the weighted sum of the chosen experts.
    """
    from transformers.integrations import moe

    top_k, experts = top_k_index.shape[-1], self.num_experts
    # Stable, so that the rows of one expert keep the order of tokens, and their samples are ascending.
    expert, permutation = torch.sort(top_k_index.reshape(-1), stable=True)
    token = permutation // top_k
    offsets = torch.searchsorted(
        expert, torch.arange(experts, device=expert.device, dtype=expert.dtype), right=True, out_int32=True
    )
    observer = _OBSERVERS.get(self)
    call = observer(hidden_states, token, expert) if observer is not None else None

    # Under expert parallelism rows past the last local expert are left uninitialized by the matmul.
    sentinel = None
    if getattr(self, "_is_expert_parallel", False) or getattr(observer, "skips_rows", False):
        sentinel = (expert >= experts).unsqueeze(-1)
        expert = expert.clamp(max=experts - 1)

    def project(z: Tensor, name: str, outputs: Callable[[Tensor], None]) -> Tensor:
        y = moe._grouped_linear(z, getattr(self, name), offsets, is_transposed=self.is_transposed)
        base = base_weight(self, name) if call is not None else None
        if base is None:
            outputs(y)
        else:  # LoRA on the experts: the model continues with W + dW, and W is scored
            with torch.no_grad():
                outputs(moe._grouped_linear(z, base, offsets, is_transposed=self.is_transposed))
        if self.has_bias:
            y.add_(getattr(self, f"{name}_bias")[expert])
        return y if sentinel is None else y.masked_fill(sentinel, 0.0)

    *first, down = ExpertsAdapter().projections(self)

    def see_first(y: Tensor) -> None:
        for index, projection in enumerate(first):
            if call is not None:
                call.output(index, y, projection.split, projection.index)

    def see_down(y: Tensor) -> None:
        if call is not None:
            call.output(len(first), y)

    z = hidden_states[token]
    if sentinel is not None:
        z.masked_fill_(sentinel, 0.0)
    y = project(z, first[0].parameter, see_first)
    z = self._apply_gate(y) if self.has_gate else self.act_fn(y)
    if call is not None:
        call.input(z)
    y = project(z, down.parameter, see_down)
    if call is not None:
        call.finish()
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    weights = top_k_weights.reshape(-1)
    if sentinel is not None:
        weights = weights.masked_fill((top_k_index >= experts).reshape(-1), 0.0)
    return _weighted_sum(y, inverse.view(-1, top_k), weights.view(-1, top_k)).to(hidden_states.dtype)


def _weighted_sum(y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Return [T, H]: the sum over k of weights[t, k] * y[rows[t, k]].

    If possible, in one pass. transformers makes three passes over all [S, H] rows: to multiply, to reorder by token,
    and to add. The difference is more than the cost of observing. The products are not rounded to half precision in
    between.
    """
    if y.dtype == weights.dtype and not torch.is_grad_enabled():
        return functional.embedding_bag(rows, y, per_sample_weights=weights, mode="sum")
    return (y[rows] * weights.unsqueeze(-1)).sum(dim=1)


def first_rows(layers: Sequence[tuple[int, LinearLayer]], module: nn.Module) -> list[int | None]:
    """Return the first row in the totals of each projection's experts; None for a projection that is not scored.

    Raises:
        ValueError: If experts of a projection are missing, or not neighbours.
    """
    experts = ExpertsAdapter().experts(module)
    rows: list[int | None] = [None] * len(ExpertsAdapter().projections(module))
    for index, layer in layers:
        projection, expert = divmod(layer.part, experts)
        first = rows[projection]
        if first is None:
            rows[projection] = first = index - expert
        if index != first + expert:
            raise ValueError(f"`layers` must hold the experts of `{layer.name}`'s module in order and whole")
    if len(layers) != experts * sum(row is not None for row in rows):
        raise ValueError(f"`layers` must hold all experts of the module of `{layers[0][1].name}`")
    return rows
