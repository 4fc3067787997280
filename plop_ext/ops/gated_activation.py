"""`gated_activation_`: SwiGLU and GeGLU, with the sums of squares of what it reads and writes."""

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

ACTIVATIONS = ("silu", "gelu_tanh")

torch.library.define(
    f"{NAMESPACE}::gated_activation_",
    "(Tensor(a!) out, Tensor gate, Tensor up, str activation, Tensor? gate_bias=None, Tensor? up_bias=None, "
    "Tensor(b!)? gate_sumsq=None, Tensor(c!)? up_sumsq=None, Tensor(d!)? out_sumsq=None, int step=1, int phase=0) "
    "-> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake(f"{NAMESPACE}::gated_activation_")
def gated_activation_fake(
    out: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_sumsq: Tensor | None = None,
    up_sumsq: Tensor | None = None,
    out_sumsq: Tensor | None = None,
    step: int = 1,
    phase: int = 0,
) -> None:
    op = "gated_activation_"
    vectors = given({"gate_bias": gate_bias, "up_bias": up_bias})
    sums = given({"gate_sumsq": gate_sumsq, "up_sumsq": up_sumsq, "out_sumsq": out_sumsq})
    check_fused(op, ("gate", gate), {"out": out, "up": up, **vectors}, sums, {"gate": 2, "out": 2, "up": 2})
    rows, width = gate.shape
    check(width > 0 and width % VECTOR == 0, f"{op}: gate must have a multiple of {VECTOR} as last size, got {width}")
    check_shape(op, "out", out, [rows, width])
    check_shape(op, "up", up, [rows, width])
    for name, tensor in vectors.items():
        check_elements(op, name, tensor, width)
    for name, tensor in (("gate", gate), ("up", up)):
        row, feature = tensor.stride()
        check(
            rows == 0 or (feature == 1 and (rows == 1 or row % VECTOR == 0)),
            f"{op}: {name} must have strides (s, 1), s a multiple of {VECTOR}, got ({row}, {feature})",
        )
    for name, tensor in {"out": out, **vectors, **sums}.items():
        check_contiguous(op, name, tensor)
    for name, tensor in {"gate": gate, "out": out, "up": up, **vectors}.items():
        check_aligned(op, name, tensor)
    check(activation in ACTIVATIONS, f"{op}: activation must be {' or '.join(ACTIVATIONS)}, got {activation}")
    check_step(op, step, phase)
    for name, tensor in sums.items():
        check_rows(op, name, tensor, rows, step, phase)
