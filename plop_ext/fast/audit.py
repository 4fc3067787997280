"""Compares what fused kernels write with what the PyTorch kernels of the same ops do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plop_ext import ops

# A kernel treats all rows alike; so many tell, and their float32 copies take little memory.
_ROWS = 1024
# One unit in the last place of every element is half of `eps`; kernels turn it in one of a thousand, which moves the
# sum of a short row by less than `eps`. In float32 exp and tanh differ by some units.
_FLOAT32_LIMIT = 1e-5


class Audit:
    """The worst differences of the kernels' calls so far; they stay on the device until `disagreement`."""

    def __init__(self) -> None:
        self._found: list[tuple[str, float, Tensor]] = []

    def compare(
        self,
        twin: Callable[..., None],
        args: Sequence[Any],
        *,
        rows: Sequence[int],
        written: Sequence[int],
        sums: Sequence[int],
    ) -> None:
        """Compare one call, row by row.

        Args:
            twin: The op's PyTorch kernel.
            args: What the op was called with; step and phase are the last two.
            rows: Positions of tensors with one entry per row first, [R, ...] or [B, T, ...].
            written: Those of them that the op writes.
            sums: Positions of the sums, one per row read.
        """
        step, phase = args[-2:]
        again = list(args)
        for place in rows:
            again[place] = _first_rows(args[place])
        count = again[written[0]].shape[:-1].numel() if again[written[0]].dim() == 2 else again[written[0]].shape[1]
        read = ops.rows_read(count, step, phase)
        for place in sums:
            again[place] = None if args[place] is None else args[place][:read]
        results = [place for place in (*written, *sums) if args[place] is not None]
        ours = {place: again[place] for place in results}
        for place in results:
            again[place] = torch.empty(ours[place].shape, dtype=ours[place].dtype, device=ours[place].device)
        twin(*again)
        name = twin.__name__.removesuffix("_pytorch")
        for place in results:
            limit = max(torch.finfo(ours[written[0]].dtype).eps, _FLOAT32_LIMIT)
            self._found.append((name, limit, row_errors(ours[place], again[place], again[place]).max()))

    def disagreement(self) -> str | None:
        """What is off by more than rounding, or None. Waits for the device."""
        for name, limit, error in self._found:
            if not float(error) <= limit:
                return f"a row of {name} is off by {float(error):.1e}, more than {limit:.1e}"
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


def _first_rows(x: Tensor | None) -> Tensor | None:
    """[R, ...]: the first rows; [B, T, ...]: the first tokens of the first sample."""
    if x is None:
        return None
    return x[:_ROWS] if x.dim() == 2 else x[:1, :_ROWS]
