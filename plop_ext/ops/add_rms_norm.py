"""`add_rms_norm_`: residual add and RMSNorm of a block, with the sums of squares of what it reads and writes."""

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

MAX_IN_FEATURES = 32768

torch.library.define(
    f"{NAMESPACE}::add_rms_norm_",
    "(Tensor(a!) normed, Tensor(b!)? hidden, Tensor x, Tensor? residual, Tensor weight, float eps, "
    "Tensor? inner_weight=None, float inner_eps=0., bool unit_offset=False, Tensor? bias=None, "
    "Tensor(c!)? x_sumsq=None, Tensor(d!)? normed_sumsq=None, int step=1, int phase=0) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake(f"{NAMESPACE}::add_rms_norm_")
def add_rms_norm_fake(
    normed: Tensor,
    hidden: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    inner_weight: Tensor | None = None,
    inner_eps: float = 0.0,
    unit_offset: bool = False,
    bias: Tensor | None = None,
    x_sumsq: Tensor | None = None,
    normed_sumsq: Tensor | None = None,
    step: int = 1,
    phase: int = 0,
) -> None:
    op = "add_rms_norm_"
    matrices = given({"normed": normed, "hidden": hidden, "residual": residual})
    vectors = given({"weight": weight, "inner_weight": inner_weight, "bias": bias})
    sums = given({"x_sumsq": x_sumsq, "normed_sumsq": normed_sumsq})
    check_fused(op, ("x", x), {**matrices, **vectors}, sums, dict.fromkeys(("x", *matrices), 2))
    rows, width = x.shape
    check(
        0 < width <= MAX_IN_FEATURES and width % VECTOR == 0,
        f"{op}: x must have a multiple of {VECTOR} up to {MAX_IN_FEATURES} as last size, got {width}",
    )
    for name, tensor in matrices.items():
        check_shape(op, name, tensor, [rows, width])
    for name, tensor in vectors.items():
        check_elements(op, name, tensor, width)
    for name, tensor in {"x": x, **matrices, **vectors, **sums}.items():
        check_contiguous(op, name, tensor)
    for name, tensor in {"x": x, **matrices, **vectors}.items():
        check_aligned(op, name, tensor)
    check_step(op, step, phase)
    for name, tensor in sums.items():
        check_rows(op, name, tensor, rows, step, phase)
