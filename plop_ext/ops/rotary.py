"""`rotary_`: rotary position embedding of queries and keys, with the sums of squares of what it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from plop_ext.ops.checks import (
    NAMESPACE,
    VECTOR,
    check,
    check_aligned,
    check_contiguous,
    check_elements,
    check_fused,
    check_rows,
    check_shape,
    check_step,
    given,
)

UNIT = 16  # the rotary and the unrotated part of a head are made of so many features each
MAX_HEAD_DIM = 512
NORMED_HEAD_DIMS = (16, 32, 64, 128, 256, 512)

torch.library.define(
    f"{NAMESPACE}::rotary_",
    "(Tensor(a!) q_out, Tensor(b!) k_out, Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight=None, "
    "Tensor? k_weight=None, float eps=0., bool unit_offset=False, Tensor? q_bias=None, Tensor? k_bias=None, "
    "Tensor(c!)? q_sumsq=None, Tensor(d!)? k_sumsq=None, int step=1, int phase=0) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake(f"{NAMESPACE}::rotary_")
def rotary_fake(
    q_out: Tensor,
    k_out: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    unit_offset: bool = False,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    q_sumsq: Tensor | None = None,
    k_sumsq: Tensor | None = None,
    step: int = 1,
    phase: int = 0,
) -> None:
    op = "rotary_"
    heads = {"q_out": q_out, "k_out": k_out, "k": k}
    tables = {"cos": cos, "sin": sin}
    weights = given({"q_weight": q_weight, "k_weight": k_weight})
    biases = given({"q_bias": q_bias, "k_bias": k_bias})
    sums = given({"q_sumsq": q_sumsq, "k_sumsq": k_sumsq})
    dims = {**dict.fromkeys(("q", *heads), 4), **dict.fromkeys(tables, 3)}
    check_fused(op, ("q", q), {**heads, **tables, **weights, **biases}, sums, dims)

    batch, length, _, width = q.shape
    rotary = cos.shape[2]
    check(
        0 < width <= MAX_HEAD_DIM and width % UNIT == 0,
        f"{op}: q must have a multiple of {UNIT} up to {MAX_HEAD_DIM} as last size, got {width}",
    )
    check(
        0 < rotary <= width and rotary % UNIT == 0,
        f"{op}: cos must have a multiple of {UNIT} up to {width} as last size, got {rotary}",
    )
    check(len(weights) != 1, f"{op}: q_weight and k_weight must come together, got one")
    if weights:
        check(
            width in NORMED_HEAD_DIMS,
            f"{op}: q must have {UNIT} times a power of two as last size with a weight, got {width}",
        )
    check(q.shape[2] > 0, f"{op}: q must have at least 1 head, got 0")
    check(k.shape[2] > 0, f"{op}: k must have at least 1 head, got 0")
    check_shape(op, "q_out", q_out, list(q.shape))
    check_shape(op, "k_out", k_out, list(k.shape))
    check_shape(op, "k", k, [batch, length, k.shape[2], width])
    check_shape(op, "cos", cos, [1 if cos.shape[0] == 1 else batch, length, rotary])
    check_shape(op, "sin", sin, list(cos.shape))
    for name, tensor in weights.items():
        check_elements(op, name, tensor, width)
    for name, tensor in biases.items():
        check_elements(op, name, tensor, (q if name == "q_bias" else k).shape[2] * width)
    for name, tensor in (("q", q), ("k", k)):
        check(
            _is_projection(tensor),
            f"{op}: {name} must have strides (T * s, s, D, 1), s a multiple of {VECTOR}, got {tuple(tensor.stride())}",
        )
    for name, tensor in {"q_out": q_out, "k_out": k_out, **tables, **weights, **biases, **sums}.items():
        check_contiguous(op, name, tensor)
    for name, tensor in {"q": q, **heads, **tables, **weights, **biases}.items():
        check_aligned(op, name, tensor)
    check_step(op, step, phase)
    for name, tensor in sums.items():
        check_rows(op, name, tensor, batch * length, step, phase)


def _is_projection(x: Tensor) -> bool:
    """Whether `x` [B, T, H, D] is a view of [B, T, s] whose tokens lie equally far apart."""
    batch, length, heads, width = x.shape
    if batch == 0 or length == 0:
        return True
    sample, token, head, feature = x.stride()
    if feature != 1 or (heads > 1 and head != width):
        return False
    if length > 1:
        return token % VECTOR == 0 and (batch == 1 or sample == length * token)
    return batch == 1 or sample % VECTOR == 0
