"""The comparison of the results of fused kernels with those of the PyTorch kernels of the same ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plop_ext import ops

# Number of rows that are compared, spread over the whole call; their float32 copies take little memory.
_ROWS = 1024
# An error of one unit in the last place of every element is half of `eps`. Of the kernels' elements one in a thousand
# has this error, which moves the sum of a short row by less than `eps`. In float32 exp and tanh differ by some units.
_FLOAT32_LIMIT = 1e-5


class Roles(NamedTuple):
    """The roles of the arguments of a fused op, by name.

    Attributes:
        rows: Tensors with one entry per row first, [R, ...], or per token, [B or 1, T, ...].
        results: Those of `rows` that the op writes.
        sums: Sums of squares that the op writes, one per row read.
    """

    rows: tuple[str, ...]
    results: tuple[str, ...]
    sums: tuple[str, ...]


@functools.cache
def roles_of(op: str) -> Roles:
    """Derive the roles from the op's schema, which marks written tensors; names mark weights, biases and sums."""
    tensors = {
        argument.name: argument.alias_info is not None and argument.alias_info.is_write
        for argument in getattr(torch.ops.plop_ext, op).default._schema.arguments
        if "Tensor" in str(argument.type)
    }
    sums = tuple(name for name, written in tensors.items() if written and name.endswith("_sumsq"))
    rows = tuple(name for name in tensors if name not in sums and not name.endswith(("weight", "bias")))
    return Roles(rows, tuple(name for name in rows if tensors[name]), sums)


class Audit:
    """The worst differences of the kernels' calls so far, which stay on the device until `disagreement`."""

    def __init__(self) -> None:
        self._worst: dict[tuple[str, float], Tensor] = {}

    def compare(self, op: str, arguments: Mapping[str, Any], out_scale: Callable[..., Tensor] | None = None) -> None:
        """Compare one call, row by row.

        Args:
            op: Name of the op.
            arguments: All arguments of the call, by name.
            out_scale: Function of the arguments, cut to the rows compared. It returns the values [rows, ...] to which
                the errors of `out` are relative; those of `out_sumsq` are relative to the sums of their squares.
                Default: the values that the PyTorch kernel writes.
        """
        roles = roles_of(op)
        step, phase = arguments["step"], arguments["phase"]
        like = arguments[roles.results[0]]
        count = like.shape[0] if like.dim() == 2 else like.shape[:2].numel()
        read = ops.rows_read(count, step, phase)
        # Rows with sums, if there are any.
        places = torch.arange(0, read, max(1, read // _ROWS), device=like.device)
        chosen = phase + step * places if read else torch.arange(0, count, max(1, count // _ROWS), device=like.device)
        if len(chosen) == 0:
            return
        again = {**arguments, "step": 1, "phase": 0}
        for name in roles.rows:
            again[name] = _rows(arguments[name], chosen, like.shape[1])
        ours = {name: again[name] for name in roles.results if arguments[name] is not None}
        ours |= {name: arguments[name][places] for name in roles.sums if arguments[name] is not None and read}
        for name in (*roles.results, *roles.sums):
            again[name] = torch.empty_like(ours[name]) if name in ours else None
        getattr(ops, f"{op}pytorch")(**again)
        scales = {}
        if out_scale is not None:
            scales["out"] = out_scale(**again)
            scales["out_sumsq"] = scales["out"].square().sum(dim=1)
        key = op.removesuffix("_"), max(torch.finfo(like.dtype).eps, _FLOAT32_LIMIT)
        for name, found in ours.items():
            worst = row_errors(found, again[name], scales.get(name, again[name])).max()
            before = self._worst.get(key)
            # `maximum` keeps NaN, the error of a row that cannot be compared.
            self._worst[key] = worst if before is None else torch.maximum(before, worst)

    def has(self, op: str) -> bool:
        """Return whether a call of an op, without the underscore at the end of its name, was compared."""
        return any(name == op for name, _ in self._worst)

    def disagreement(self) -> str | None:
        """Return the first difference beyond rounding, or None. Synchronizes."""
        for (name, limit), worst in self._worst.items():
            if not float(worst) <= limit:
                return f"a row of {name} is off by {float(worst):.1e}, more than {limit:.1e}"
        return None


def row_errors(ours: Tensor, theirs: Tensor, scale: Tensor) -> Tensor:
    """Return ||ours - theirs|| / ||scale|| of each row [R]: token vectors, all heads of a token, or single sums.

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
    """Return the chosen rows of [R, ...], or the chosen tokens of [B or 1, T, ...] as samples of one token each."""
    if x is None:
        return None
    if x.dim() == 2:
        return x[chosen]
    sample, token = chosen // tokens, chosen % tokens
    return x[sample if x.shape[0] > 1 else torch.zeros_like(sample), token].unsqueeze(1)
