"""`rotary_`: rotary position embedding of queries and keys, with the sums of squares of what it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from plop_ext.ops._schema import (
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
    register_fake,
)
from plop_ext.ops.add_rms_norm import rms_norm
from plop_ext.ops.row_sumsq import write_sumsq

UNIT = 16  # both the rotated and the unrotated part of a head are multiples of this
MAX_HEAD_DIM = 256
NORMED_HEAD_DIMS = (16, 32, 64, 128, 256)

torch.library.define(
    f"{NAMESPACE}::rotary_",
    "(Tensor(a!) q_out, Tensor(b!) k_out, Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight=None, "
    "Tensor? k_weight=None, float eps=0., bool unit_offset=False, Tensor? q_bias=None, Tensor? k_bias=None, "
    "Tensor(c!)? q_sumsq=None, Tensor(d!)? k_sumsq=None, int step=1, int phase=0) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def rotary_(
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
    r"""Rotate queries and keys to their positions, after an optional norm of each head, with sums of squares.

    Each head is used directly, \(n = x\), or normed, \(n = \mathrm{rms}(x) \cdot w\) (Qwen3, Gemma 3; see
    `add_rms_norm_`). Its first R features, R the last size of `cos`, are then rotated:
    \(out_d = n_d \cos_d - n_{d+R/2} \sin_d\) in the first half of them and
    \(out_d = n_d \cos_d + n_{d-R/2} \sin_d\) in the second; the others remain \(n_d\). The same pass emits the sums of
    squares of the outputs of the two projections, over all heads of a token: \(\sum_{hd} (x_{hd} - b_{hd})^2\).

    Every product and every sum is rounded to `q`'s dtype, as in the operators of transformers' `apply_rotary_pos_emb`;
    without a norm, every kernel is bitwise identical to them. With a norm, the native kernels add in another order,
    which changes the last bit of a few elements. Sums accumulate in float32. In the native kernels, the result of a
    token does not depend on other tokens.

    Args:
        q_out: [B, T, H, D], written, contiguous. Transpose it to get the [B, H, T, D] that attention takes.
        k_out: [B, T, Hk, D], written, contiguous.
        q: [B, T, H, D] float32, float16 or bfloat16, D a multiple of 16, at most 256; strides (T * s, s, D, 1) with s
            a multiple of 8, so that the parts of a packed projection can be read in place.
        k: [B, T, Hk, D], with strides like those of `q`.
        cos: [B or 1, T, R], contiguous, R <= D a multiple of 16.
        sin: Like `cos`.
        q_weight: [D], of the norm of the queries, together with `k_weight`; D is then 16 times a power of two. None
            for a model without the norms.
        k_weight: [D], of the norm of the keys.
        eps: Epsilon of both norms.
        unit_offset: The weights are stored as their distance from 1 (Gemma).
        q_bias: [H * D], bias of the projection, which `q_sumsq` excludes.
        k_bias: [Hk * D], bias of the projection, which `k_sumsq` excludes.
        q_sumsq: [N] float32, written, where N = `rows_read(B * T, step, phase)`; None omits it.
        k_sumsq: [N] float32, written; None omits it.
        step: Write the sums of every `step`-th token only; q_out and k_out are always whole.
        phase: The first token whose sums are written, in [0, step).

    All tensors but the sums share `q`'s dtype and start at a multiple of 8 elements of their storage.

    Raises:
        RuntimeError: If an argument has the wrong device, dtype, rank, size or layout; the message names it.
    """
    torch.ops.plop_ext.rotary_.default(
        q_out,
        k_out,
        q,
        k,
        cos,
        sin,
        q_weight,
        k_weight,
        eps,
        unit_offset,
        q_bias,
        k_bias,
        q_sumsq,
        k_sumsq,
        step,
        phase,
    )


@register_fake("rotary_")
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
    """Return whether `x` [B, T, H, D] is a view of [B, T, s] whose tokens lie equally far apart."""
    batch, length, heads, width = x.shape
    if batch == 0 or length == 0:
        return True
    sample, token, head, feature = x.stride()
    if feature != 1 or (heads > 1 and head != width):
        return False
    if length > 1:
        return token % VECTOR == 0 and (batch == 1 or sample == length * token)
    return batch == 1 or sample % VECTOR == 0


@torch.no_grad()
def rotary_pytorch(
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
    rotary_fake(
        q_out,
        k_out,
        q,
        k,
        cos,
        sin,
        q_weight,
        k_weight,
        eps,
        unit_offset,
        q_bias,
        k_bias,
        q_sumsq,
        k_sumsq,
        step,
        phase,
    )
    heads = ((q_out, q, q_weight, q_bias, q_sumsq), (k_out, k, k_weight, k_bias, k_sumsq))
    for out, x, weight, bias, sums in heads:
        if sums is not None:
            write_sumsq(sums, x.flatten(2), bias, step, phase)
        normed = x if weight is None else rms_norm(x, weight, eps, unit_offset)
        out.copy_(_rotated(normed, cos.unsqueeze(2), sin.unsqueeze(2)))


torch.library.impl(f"{NAMESPACE}::rotary_", "CompositeExplicitAutograd", rotary_pytorch)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return transformers' `apply_rotary_pos_emb` of one tensor [B, T, H, D], operator by operator."""
    rotated, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1)
