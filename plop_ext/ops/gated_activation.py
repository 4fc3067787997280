"""`gated_activation_`: SwiGLU and GeGLU, with the sums of squares of inputs and output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

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
from plop_ext.ops.row_sumsq import write_sumsq

ACTIVATIONS = ("silu", "gelu_tanh")

torch.library.define(
    f"{NAMESPACE}::gated_activation_",
    "(Tensor(a!) out, Tensor gate, Tensor up, str activation, Tensor? gate_bias=None, Tensor? up_bias=None, "
    "Tensor(b!)? gate_sumsq=None, Tensor(c!)? up_sumsq=None, Tensor(d!)? out_sumsq=None, int step=1, int phase=0) "
    "-> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def gated_activation_(
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
    r"""Multiply `up` by the activation of `gate`, with the sums of squares of all three.

    \(out_{rk} = a(gate_{rk}) \cdot up_{rk}\), where a is SiLU (SwiGLU) or the tanh form of GELU (GeGLU). The same pass
    emits the sums of squares of the outputs of the two projections before it, \(\sum_k (gate_{rk} - b_k)^2\) and the
    same of up, and of the input of the projection after it, \(\sum_k out_{rk}^2\).

    The kernels round where the modules do: the activation is computed in float32 and rounded to `gate`'s dtype, then
    the product is rounded. Sums accumulate in float32 over the stored values. The PyTorch kernel is bitwise identical
    to the modules. The native kernels evaluate exp and tanh by other formulas, which changes the last bit of a few
    elements; the result of a row does not depend on other rows.

    Args:
        out: [R, I], written, contiguous: the input of the down projection.
        gate: [R, I] float32, float16 or bfloat16, I a multiple of 8, strides (s, 1) with s a multiple of 8, so that
            the halves of a packed projection can be read in place.
        up: [R, I], with the layout of `gate`.
        activation: `"silu"` or `"gelu_tanh"`.
        gate_bias: [I], bias of the projection, which `gate_sumsq` excludes.
        up_bias: [I], bias of the projection, which `up_sumsq` excludes.
        gate_sumsq: [N] float32, written, where N = `rows_read(R, step, phase)`; None omits it.
        up_sumsq: [N] float32, written; None omits it.
        out_sumsq: [N] float32, written; None omits it.
        step: Write the sums of every `step`-th row only; out is always whole.
        phase: The first row whose sums are written, in [0, step).

    All tensors but the sums share `gate`'s dtype and start at a multiple of 8 elements of their storage.

    Raises:
        RuntimeError: If an argument has the wrong device, dtype, rank, size, layout or value; the message names it.
    """
    torch.ops.plop_ext.gated_activation_.default(
        out, gate, up, activation, gate_bias, up_bias, gate_sumsq, up_sumsq, out_sumsq, step, phase
    )


@register_fake("gated_activation_")
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


@torch.no_grad()
def gated_activation_pytorch(
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
    gated_activation_fake(out, gate, up, activation, gate_bias, up_bias, gate_sumsq, up_sumsq, out_sumsq, step, phase)
    for sums, x, bias in ((gate_sumsq, gate, gate_bias), (up_sumsq, up, up_bias)):
        if sums is not None:
            write_sumsq(sums, x, bias, step, phase)
    activated = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    out.copy_(activated * up)
    if out_sumsq is not None:
        write_sumsq(out_sumsq, out, None, step, phase)


torch.library.impl(f"{NAMESPACE}::gated_activation_", "CompositeExplicitAutograd", gated_activation_pytorch)
