"""The fused ops against the modules of transformers that they stand for.

The PyTorch kernels are bitwise identical to them. Native ones add the squares of a row in another order and evaluate
exp and tanh in their own way. That changes a float32 value by about 1e-7 of it, which turns the last bit of one
rounded value in 40 000 (bfloat16) or 5 000 (float16), and of more in the tail of GELU, where 1 + tanh cancels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen3 import modeling_qwen3

from plop_ext import ops, reference
from tests.support.fused_ops import (
    DTYPES,
    KERNELS,
    add_rms_norm,
    gated_activation,
    heads_of_fused,
    randn,
    rotary,
    tables,
)

# The share of elements that may differ, and by how many times eps * their magnitude any of them may.
SHARES = {torch.float32: 1.0, torch.float16: 5e-4, torch.bfloat16: 1e-4}
STEPS = {torch.float32: 8.0, torch.float16: 2.0, torch.bfloat16: 2.0}
ROWS, WIDTH = 96, 1536


def same(
    kernel: str, actual: Tensor, expected: Tensor, magnitude: Tensor | None = None, shared: Tensor | None = None
) -> None:
    """Bit for bit, or for a native kernel with few elements off.

    Args:
        kernel: `"op"` or `"pytorch"`.
        actual: Of any shape.
        expected: Of the same shape.
        magnitude: What the rounding errors of an element are relative to; default: the element.
        shared: [like actual] bool, the elements of which few may differ; default: all.
    """
    if kernel == "pytorch":
        assert torch.equal(actual, expected)
        return
    difference = (actual.double() - expected.double()).cpu()
    differs = difference != 0
    share = float((differs if shared is None else differs[shared.cpu()]).double().mean())
    assert share <= SHARES[actual.dtype], share
    magnitude = expected.double().cpu().abs() if magnitude is None else magnitude
    info = torch.finfo(actual.dtype)
    excess = difference.abs() - STEPS[actual.dtype] * info.eps * magnitude - 2 * info.smallest_normal * info.eps
    assert (excess <= 0).all(), float(excess.max())


def module(kind: Any, width: int, like: tuple[torch.device, torch.dtype], shift: float) -> Any:
    """A norm whose weights are not all alike."""
    norm = kind(width, 1e-5)
    norm.weight.data = randn(width, like=like, scale=0.3, shift=shift)
    return norm


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_residual_add_and_llama_norm(device: torch.device, kernel: str, dtype: torch.dtype) -> None:
    like = device, dtype
    norm = module(LlamaRMSNorm, WIDTH, like, shift=1)
    x, residual = randn(ROWS, WIDTH, like=like), randn(ROWS, WIDTH, like=like, scale=4)
    result = add_rms_norm(kernel, x, residual, norm.weight, norm.variance_epsilon)
    assert torch.equal(result.hidden, residual + x)
    same(kernel, result.normed, norm(residual + x))
    alone = add_rms_norm(kernel, x, None, norm.weight, norm.variance_epsilon)
    assert torch.equal(alone.hidden, x)
    same(kernel, alone.normed, norm(x))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_gemma_norms_on_both_sides_of_the_add(device: torch.device, kernel: str, dtype: torch.dtype) -> None:
    like = device, dtype
    after, before = (module(Gemma2RMSNorm, WIDTH, like, shift=0) for _ in range(2))
    x, residual = randn(ROWS, WIDTH, like=like, scale=2), randn(ROWS, WIDTH, like=like, scale=4)
    given = {"inner_weight": after.weight, "inner_eps": after.eps, "unit_offset": True}
    result = add_rms_norm(kernel, x, residual, before.weight, before.eps, **given)
    y = after(x)
    hidden = residual + y
    # A turned bit of y is one of hidden, however much of hidden the add cancels.
    magnitude = (residual.abs() + y.abs()).cpu().double()
    same(kernel, result.hidden, hidden, magnitude)
    scale = (before.weight.double().cpu() + 1).abs() / hidden.double().square().mean(-1, keepdim=True).sqrt().cpu()
    same(kernel, result.normed, before(hidden), magnitude * scale)
    alone = add_rms_norm(kernel, x, None, before.weight, before.eps, unit_offset=True)
    same(kernel, alone.normed, before(x))


def rotated(apply: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What the model computes on [B, H, T, D], back in [B, T, H, D]."""
    q_out, k_out = apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def magnitude(normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """|n cos| + |n sin|."""
    half = cos.shape[-1] // 2
    return reference.rotary(normed.abs(), cos.abs(), torch.cat((-sin[..., :half].abs(), sin[..., half:].abs()), -1))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [1, 3])
@torch.no_grad()
def test_rotation_without_a_norm_is_bitwise_identical(
    device: torch.device, kernel: str, dtype: torch.dtype, samples: int
) -> None:
    """Llama, Mistral, Qwen2; native kernels too, for every dtype."""
    like = device, dtype
    cos, sin = tables(samples, 50, 64, like)
    q, k = randn(3, 50, 6, 64, like=like, scale=3), randn(3, 50, 2, 64, like=like)
    result = rotary(kernel, q, k, cos, sin)
    expected = rotated(modeling_qwen3.apply_rotary_pos_emb, q, k, cos, sin)
    assert torch.equal(result.q, expected[0]) and torch.equal(result.k, expected[1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width, turned", [(96, 96), (128, 96), (128, 32)])
@torch.no_grad()
def test_phi3_rotates_a_part_of_each_head_in_a_fused_projection(
    device: torch.device, kernel: str, dtype: torch.dtype, width: int, turned: int
) -> None:
    like = device, dtype
    cos, sin = tables(2, 50, turned, like)
    q, k = heads_of_fused(2, 50, 4, 2, width, like)
    result = rotary(kernel, q, k, cos, sin)
    expected = rotated(modeling_phi3.apply_rotary_pos_emb, q, k, cos, sin)
    assert torch.equal(result.q, expected[0]) and torch.equal(result.k, expected[1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@torch.no_grad()
def test_a_norm_of_each_head_before_the_rotation(
    device: torch.device, kernel: str, dtype: torch.dtype, family: str
) -> None:
    like = device, dtype
    gemma = family == "gemma3"
    models = modeling_gemma3 if gemma else modeling_qwen3
    kind = models.Gemma3RMSNorm if gemma else models.Qwen3RMSNorm
    q_norm, k_norm = (module(kind, 128, like, shift=0 if gemma else 1) for _ in range(2))
    cos, sin = tables(1, 70, 128, like)
    q, k = randn(2, 70, 6, 128, like=like, scale=2), randn(2, 70, 3, 128, like=like)
    given = {"q_weight": q_norm.weight, "k_weight": k_norm.weight, "eps": 1e-5, "unit_offset": gemma}
    result = rotary(kernel, q, k, cos, sin, **given)
    expected = rotated(models.apply_rotary_pos_emb, q_norm(q), k_norm(k), cos, sin)
    same(kernel, result.q, expected[0], magnitude(q_norm(q), cos, sin))
    same(kernel, result.k, expected[1], magnitude(k_norm(k), cos, sin))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, activation", [("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh")])
@pytest.mark.parametrize("fused", [False, True])
def test_activations(
    device: torch.device, kernel: str, dtype: torch.dtype, name: str, activation: str, fused: bool
) -> None:
    assert activation in ops.ACTIVATIONS
    gate, up = randn(ROWS, 2 * WIDTH, like=(device, dtype), scale=2).chunk(2, dim=1)
    if not fused:
        gate, up = gate.contiguous(), up.contiguous()
    result = gated_activation(kernel, gate, up, activation)
    expected = ACT2FN[name](gate) * up
    if name == "silu":
        same(kernel, result.out, expected)
        return
    # GELU's 1 + tanh cancels below zero: one float32 unit of 1 is all that is left of the last bits there.
    lost = 2**-23 * (gate * up).double().abs().cpu() / (STEPS[dtype] * torch.finfo(dtype).eps)
    same(kernel, result.out, expected, expected.double().abs().cpu() + lost, shared=gate > -3)
