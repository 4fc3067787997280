"""The fused ops as PyTorch sees them: dispatch, autograd, inference mode, `torch.compile` and fake tensors."""

from __future__ import annotations

import pytest
import torch

from plop_ext import ops
from tests.support.fused_ops import (
    DTYPES,
    FUSED_OPS,
    heads_of_fused,
    randn,
    runs,
    tables,
)
from tests.support.op_results import same_bits


def test_native_kernels_serve_the_fused_ops() -> None:
    """Without this, `op` below could be the PyTorch kernel on a machine that has native ones."""
    if not ops.STATUS.loaded:
        pytest.skip(ops.STATUS.reason)
    for op in FUSED_OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"plop_ext::{op}", "CPU"), op


@pytest.mark.parametrize("op", FUSED_OPS)
@pytest.mark.parametrize("grad", [True, False])
def test_inputs_that_require_grad_and_inference_tensors(device: torch.device, op: str, grad: bool) -> None:
    run, rows = runs(device, torch.float32)[op]
    expected = run("op", **rows)
    with torch.set_grad_enabled(grad):
        result = run("op", **{name: tensor.clone().requires_grad_() for name, tensor in rows.items()})
    same_bits(result, expected)
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in result)
    with torch.inference_mode():
        same_bits(run("op", **{name: tensor.clone() for name, tensor in rows.items()}), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(device: torch.device, dtype: torch.dtype) -> None:
    like = device, dtype
    x, weight = randn(4, 16, like=like), randn(16, like=like)
    sums = [torch.zeros(2, device=device) for _ in range(3)]
    library = torch.ops.plop_ext
    new = torch.zeros_like(x), torch.zeros_like(x)
    for tail in ((None, 0.0, False), (weight, 1e-5, True, weight, *sums[:2], 2, 1)):
        torch.library.opcheck(library.add_rms_norm_.default, (*new, x, x + 1, weight, 1e-5, *tail))
        torch.library.opcheck(library.add_rms_norm_.default, (new[0], None, x, None, weight, 1e-5, *tail))
    fused = randn(4, 32, like=like)
    for tail in ((), (weight, weight, *sums, 2, 1)):
        gate, up = fused.chunk(2, dim=1)
        torch.library.opcheck(library.gated_activation_.default, (new[0], gate, up, "silu", *tail))
    q, k = heads_of_fused(2, 2, 3, 2, 16, like)
    turned, cos_sin = (torch.zeros(q.shape).to(*like), torch.zeros(k.shape).to(*like)), tables(1, 2, 16, like)
    biases = randn(48, like=like), randn(32, like=like)
    for tail in ((), (weight, weight, 1e-5, True, *biases, *sums[:2], 2, 1)):
        torch.library.opcheck(library.rotary_.default, (*turned, q, k, *cos_sin, *tail))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", FUSED_OPS)
def test_compiles_without_a_graph_break(device: torch.device, backend: str, op: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda rows, run: tuple(run("op", **rows)), fullgraph=True, backend=backend, dynamic=True)
    for rows in (4, 7):
        run, tensors = runs(device, torch.float32, rows)[op]
        for actual, expected in zip(compiled(tensors, run), run("op", **tensors), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_meta_tensors_pass_without_data() -> None:
    x, weight = torch.empty(2**20, 2**14, device="meta"), torch.empty(2**14, device="meta")
    sums = torch.empty(2**20, device="meta")
    ops.add_rms_norm_(x, x, x, x, weight, 1e-5, x_sumsq=sums, normed_sumsq=sums)
    ops.gated_activation_(x, x, x, "silu", out_sumsq=sums)
    heads, cos = x.view(2**10, 2**10, 2**7, 2**7), torch.empty(1, 2**10, 2**7, device="meta")
    ops.rotary_(heads, heads, heads, heads, cos, cos, q_sumsq=sums)
