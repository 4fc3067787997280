"""`gated_projection_`: both matrix products of a gated MLP with SwiGLU or GeGLU, and the sums of squares of each."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from plop_ext.ops._schema import (
    NAMESPACE,
    VECTOR,
    check,
    check_aligned,
    check_contiguous,
    check_fused,
    check_rows,
    check_shape,
    check_step,
    given,
    register_fake,
)
from plop_ext.ops.gated_activation import ACTIVATIONS, gated_activation_pytorch

PROJECTION_FLOATS = (torch.float16, torch.bfloat16)

torch.library.define(
    f"{NAMESPACE}::gated_projection_",
    "(Tensor(a!) out, Tensor x, Tensor gate_weight, Tensor up_weight, str activation, Tensor(b!)? gate_sumsq=None, "
    "Tensor(c!)? up_sumsq=None, Tensor(d!)? out_sumsq=None, int step=1, int phase=0) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(f"{NAMESPACE}::has_gated_projection", "(Tensor device) -> bool")


def gated_projection_(
    out: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    activation: str,
    gate_sumsq: Tensor | None = None,
    up_sumsq: Tensor | None = None,
    out_sumsq: Tensor | None = None,
    step: int = 1,
    phase: int = 0,
) -> None:
    r"""Project `x` by both weights and multiply the one by the activation of the other, with sums of squares.

    \(gate = x W_g^T\), \(up = x W_u^T\), \(out_{rk} = a(gate_{rk}) \cdot up_{rk}\), where a is SiLU (SwiGLU) or the
    tanh form of GELU (GeGLU); the sums are \(\sum_k gate_{rk}^2\), \(\sum_k up_{rk}^2\) and \(\sum_k out_{rk}^2\).
    Neither gate nor up is written to memory, which saves writing and reading 4 R I elements.

    The kernels round where the modules do: gate, up, the activation and the product, to `x`'s dtype. Products
    accumulate in float32, on Hopper in the order of cuBLAS' kernels without split-K. Sums accumulate in float32 over
    the rounded values. In the native kernel, the result of a row does not depend on other rows.

    The native kernel runs on devices of compute capability 9.0 (`has_gated_projection`); the PyTorch kernel runs on
    the CPU and on every device other than CUDA.

    Args:
        out: [R, I], written, contiguous, I a multiple of 8: the input of the down projection. Shares no memory with
            the inputs.
        x: [R, K] float16 or bfloat16, contiguous, K a multiple of 8.
        gate_weight: [I, K], contiguous.
        up_weight: [I, K], contiguous.
        activation: `"silu"` or `"gelu_tanh"`.
        gate_sumsq: [N] float32, written, where N = `rows_read(R, step, phase)`; None omits it.
        up_sumsq: [N] float32, written; None omits it.
        out_sumsq: [N] float32, written; None omits it.
        step: Write the sums of every `step`-th row only; out is always whole.
        phase: The first row whose sums are written, in [0, step).

    All tensors but the sums share `x`'s dtype and start at a multiple of 8 elements of their storage. With sums the
    native kernel uses 12 R I / 128 bytes of memory during the call.

    Raises:
        RuntimeError: If an argument has the wrong device, dtype, rank, size, layout or value, or there is no kernel
            for a CUDA device; the message names it.
    """
    torch.ops.plop_ext.gated_projection_.default(
        out, x, gate_weight, up_weight, activation, gate_sumsq, up_sumsq, out_sumsq, step, phase
    )


def has_gated_projection(device: torch.device) -> bool:
    """Return whether the native `gated_projection_` runs on `device`: one of CUDA's with compute capability 9.0."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _has_kernel(device)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    return bool(torch.ops.plop_ext.has_gated_projection.default(torch.empty(0, device=device)))


@register_fake("gated_projection_")
def gated_projection_fake(
    out: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    activation: str,
    gate_sumsq: Tensor | None = None,
    up_sumsq: Tensor | None = None,
    out_sumsq: Tensor | None = None,
    step: int = 1,
    phase: int = 0,
) -> None:
    op = "gated_projection_"
    weights = {"gate_weight": gate_weight, "up_weight": up_weight}
    sums = given({"gate_sumsq": gate_sumsq, "up_sumsq": up_sumsq, "out_sumsq": out_sumsq})
    check_fused(op, ("x", x), {"out": out, **weights}, sums, {"x": 2, "out": 2, "gate_weight": 2, "up_weight": 2})
    check(x.dtype in PROJECTION_FLOATS, f"{op}: x must be float16 or bfloat16, got Float")
    rows, in_features = x.shape
    features = out.shape[1]
    for name, width in (("x", in_features), ("out", features)):
        fits = width > 0 and width % VECTOR == 0
        check(fits, f"{op}: {name} must have a multiple of {VECTOR} as last size, got {width}")
    for name, weight in weights.items():
        check_shape(op, name, weight, [features, in_features])
    check_shape(op, "out", out, [rows, features])
    for name, tensor in {"x": x, "out": out, **weights, **sums}.items():
        check_contiguous(op, name, tensor)
    for name, tensor in {"x": x, "out": out, **weights}.items():
        check_aligned(op, name, tensor)
    check(activation in ACTIVATIONS, f"{op}: activation must be {' or '.join(ACTIVATIONS)}, got {activation}")
    check_step(op, step, phase)
    for name, tensor in sums.items():
        check_rows(op, name, tensor, rows, step, phase)


@torch.no_grad()
def gated_projection_pytorch(
    out: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    activation: str,
    gate_sumsq: Tensor | None = None,
    up_sumsq: Tensor | None = None,
    out_sumsq: Tensor | None = None,
    step: int = 1,
    phase: int = 0,
) -> None:
    gated_projection_fake(out, x, gate_weight, up_weight, activation, gate_sumsq, up_sumsq, out_sumsq, step, phase)
    gate, up = functional.linear(x, gate_weight), functional.linear(x, up_weight)
    gated_activation_pytorch(out, gate, up, activation, None, None, gate_sumsq, up_sumsq, out_sumsq, step, phase)


torch.library.impl(f"{NAMESPACE}::gated_projection_", "CompositeExplicitAutograd", gated_projection_pytorch)
torch.library.impl(f"{NAMESPACE}::has_gated_projection", "CompositeExplicitAutograd", lambda device: False)
