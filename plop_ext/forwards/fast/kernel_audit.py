"""Compares what fused kernels write with what the PyTorch kernels of the same ops do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plop_ext import ops

# So many rows of a call, spread over all of it, are compared; their float32 copies take little memory.
_ROWS = 1024
# One unit in the last place of every element is half of `eps`; kernels turn it in one of a thousand, which moves the
# sum of a short row by less than `eps`. In float32 exp and tanh differ by some units.
_FLOAT32_LIMIT = 1e-5


class Audit:
    """The worst differences of the kernels' calls so far; they stay on the device until `disagreement`."""

    def __init__(self) -> None:
        self._worst: dict[tuple[str, float], Tensor] = {}

    def compare(
        self,
        twin: Callable[..., None],
        args: Sequence[Any],
        *,
        rows: Sequence[int],
        written: Sequence[int],
        sums: Sequence[int],
        scales: Mapping[int, Callable[[Sequence[Any]], Tensor]] | None = None,
    ) -> None:
        """Compare one call, row by row.

        Args:
            twin: The op's PyTorch kernel.
            args: What the op was called with; step and phase are the last two.
            rows: Positions of tensors with one entry per row first, [R, ...], or per token, [B or 1, T, ...].
            written: Those of them that the op writes.
            sums: Positions of the sums, one per row read.
            scales: By position of what is written, [rows, ...] from the arguments of the rows compared that its errors
                are relative to; default: what the twin writes.
        """
        step, phase = args[-2:]
        like = args[written[0]]
        count = like.shape[0] if like.dim() == 2 else like.shape[:2].numel()
        read = ops.rows_read(count, step, phase)
        # Rows that have sums, as far as any have.
        places = torch.arange(0, read, max(1, read // _ROWS), device=like.device)
        chosen = phase + step * places if read else torch.arange(0, count, max(1, count // _ROWS), device=like.device)
        if len(chosen) == 0:
            return
        again = list(args)
        again[-2:] = 1, 0
        for place in rows:
            again[place] = _rows(args[place], chosen, like.shape[1])
        ours = {place: again[place] for place in written if args[place] is not None}
        ours |= {place: args[place][places] for place in sums if args[place] is not None and read}
        for place in (*written, *sums):
            again[place] = None
            if place in ours:
                again[place] = torch.empty_like(ours[place])
        twin(*again)
        name = twin.__name__.removesuffix("_pytorch")
        limit = max(torch.finfo(like.dtype).eps, _FLOAT32_LIMIT)
        for place, found in ours.items():
            size = again[place] if scales is None or place not in scales else scales[place](again)
            worst = row_errors(found, again[place], size).max()
            before = self._worst.get((name, limit))
            # NaN, the error of a row that is none, is kept.
            self._worst[name, limit] = worst if before is None else torch.maximum(before, worst)

    def has(self, op: str) -> bool:
        """Whether a call of an op, without the underscore at the end of its name, was compared."""
        return any(name == op for name, _ in self._worst)

    def disagreement(self) -> str | None:
        """What is off by more than rounding, or None. Waits for the device."""
        for (name, limit), worst in self._worst.items():
            if not float(worst) <= limit:
                return f"a row of {name} is off by {float(worst):.1e}, more than {limit:.1e}"
        return None


def row_errors(ours: Tensor, theirs: Tensor, scale: Tensor) -> Tensor:
    """||ours - theirs|| / ||scale|| of each row [R]: token vectors, all heads of a token, or single sums.

    Equal infinities and NaN are equal; a value that is finite in `theirs` alone makes its row NaN or infinite.
    """
    if ours.dim() == 1:
        ours, theirs, scale = (x.unsqueeze(1) for x in (ours, theirs, scale))
    elif ours.dim() == 4:
        ours, theirs, scale = (x.flatten(2) for x in (ours, theirs, scale))
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    difference = torch.where(same, 0.0, ours.float() - theirs.float())
    size = torch.linalg.vector_norm(scale.float().nan_to_num(0.0, 0.0, 0.0), dim=-1)
    return (torch.linalg.vector_norm(difference, dim=-1) / size.clamp_min(torch.finfo(torch.float32).tiny)).flatten()


def _rows(x: Tensor | None, chosen: Tensor, tokens: int) -> Tensor | None:
    """[R, ...]: the chosen rows; [B or 1, T, ...]: the chosen tokens, as samples of one token each."""
    if x is None:
        return None
    if x.dim() == 2:
        return x[chosen]
    sample, token = chosen // tokens, chosen % tokens
    return x[sample if x.shape[0] > 1 else torch.zeros_like(sample), token].unsqueeze(1)
