"""`gated_projection_`: against the oracle, against exact products, and its own promises."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from plop_ext import ops, reference
from tests.support.fused_ops import blank, blank_sums, gated_activation, kernel_of, randn
from tests.support.op_results import roundoff, same_bits, sums_are, within

OP = "gated_projection_"
DTYPES = [torch.float16, torch.bfloat16]
# Rows, K, I: within a tile, one and several tiles of 256 x 128, ends within a tile and within a stage of 64.
SIZES = [(1, 8, 8), (3, 64, 128), (130, 72, 136), (256, 200, 8), (300, 1024, 264), (1030, 136, 1000)]
SUMS = ("gate_sumsq", "up_sumsq", "out_sumsq")


class Projected(NamedTuple):
    out: Tensor
    gate_sumsq: Tensor
    up_sumsq: Tensor
    out_sumsq: Tensor


@pytest.fixture(params=["op", "pytorch"])
def kernel(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "op" and device.type == "cuda" and not ops.has_gated_projection(device):
        pytest.skip("there is no kernel for this device's compute capability")
    return str(request.param)


def project(
    kernel: str, x: Tensor, gate_weight: Tensor, up_weight: Tensor, activation: str = "silu", **given: Any
) -> Projected:
    """All four outputs; `given` holds the arguments after `activation` by name."""
    place = given.get("step", 1), given.get("phase", 0)
    out = blank((len(x), len(gate_weight)), x)
    result = Projected(out, *(blank_sums(len(x), x, *place) for _ in range(3)))
    sums = dict(zip(SUMS, result[1:], strict=True))
    assert kernel_of(OP, kernel)(out, x, gate_weight, up_weight, activation, **{**sums, **given}) is None
    return result


def drawn(rows: int, k: int, i: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x and both weights; gate and up are about 1."""
    like = device, dtype
    return randn(rows, k, like=like), randn(i, k, like=like, scale=k**-0.5), randn(i, k, like=like, scale=k**-0.5)


def whole_numbers(
    rows: int, k: int, i: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x and weights whose products are exact in float32, for every order of their sum."""
    x = torch.randint(-4, 5, (rows, k)).to(device, dtype)
    return x, *(torch.randint(-2, 3, (i, k)).to(device, dtype) / 16 for _ in range(2))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, k, i", SIZES)
def test_projections_equal_the_oracle(
    device: torch.device, kernel: str, activation: str, dtype: torch.dtype, rows: int, k: int, i: int
) -> None:
    x, *weights = drawn(rows, k, i, device, dtype)
    result = project(kernel, x, *weights, activation)
    expected = reference.gated_projection(x, *weights, activation)
    unit = roundoff(dtype)
    wide = [tensor.cpu().double() for tensor in (x, *weights)]
    gate, up = (wide[0] @ weight.T for weight in wide[1:])
    # Rounded once; products are added in float32.
    gate_error, up_error = (
        unit * exact.abs() + k * 2.0**-24 * (wide[0].abs() @ weight.abs().T)
        for exact, weight in zip((gate, up), wide[1:], strict=True)
    )
    steepest = 1.13  # of both activations
    act_error = steepest * gate_error + (unit + 1e-6) * (gate.abs() + gate_error)  # |a(g)| <= |g|
    bound = (up.abs() + up_error) * act_error + gate.abs() * up_error
    within(result.out, expected, bound * (1 + 2 * unit) + 1.01 * unit * expected.abs())
    for name, exact, error in (("gate_sumsq", gate, gate_error), ("up_sumsq", up, up_error)):
        slack = (2 * exact.abs() * error + error**2).sum(1) + 1e-5 * exact.square().sum(1)
        assert ((getattr(result, name).cpu().double() - exact.square().sum(1)).abs() <= slack).all(), name
    sums_are(result.out_sumsq, result.out)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, k, i", SIZES)
def test_exact_products_are_bitwise_identical_to_the_activation_kernel(
    device: torch.device, kernel: str, activation: str, dtype: torch.dtype, rows: int, k: int, i: int
) -> None:
    x, *weights = whole_numbers(rows, k, i, device, dtype)
    gate, up = ((x.cpu().double() @ weight.cpu().double().T).to(dtype).to(device) for weight in weights)
    # The op has its own activation on CUDA only; elsewhere it is PyTorch's.
    same = kernel if device.type == "cuda" else "pytorch"
    expected = gated_activation(same, gate, up, activation)
    result = project(kernel, x, *weights, activation)
    assert torch.equal(result.out, expected.out)
    for name in SUMS:
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-5, atol=0)


@pytest.mark.parametrize("step, phase", [(1, 0), (3, 2), (8, 3), (400, 350)])
def test_step_and_phase_choose_sums_and_change_no_output(
    device: torch.device, kernel: str, step: int, phase: int
) -> None:
    tensors = drawn(300, 64, 136, device, torch.bfloat16)
    whole, sampled = project(kernel, *tensors), project(kernel, *tensors, step=step, phase=phase)
    assert torch.equal(sampled.out, whole.out)
    for name in SUMS:
        if kernel == "op" and device.type == "cuda":
            assert torch.equal(getattr(sampled, name), getattr(whole, name)[phase::step])
        else:
            torch.testing.assert_close(getattr(sampled, name), getattr(whole, name)[phase::step], rtol=1e-5, atol=0)


def test_a_sum_left_out_changes_no_other(device: torch.device, kernel: str) -> None:
    tensors = drawn(300, 72, 136, device, torch.bfloat16)
    whole = project(kernel, *tensors)
    for count in range(1, 4):
        for left_out in itertools.combinations(SUMS, count):
            result = project(kernel, *tensors, **dict.fromkeys(left_out))
            assert torch.equal(result.out, whole.out)
            for name in SUMS:
                if name in left_out:
                    assert getattr(result, name).isnan().all()
                else:
                    assert torch.equal(getattr(result, name), getattr(whole, name))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_values_of_the_row_alone(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    if not ops.has_gated_projection(device):
        pytest.skip("there is no kernel for this device's compute capability")
    x, *weights = drawn(520, 1096, 392, device, dtype)
    whole = project("op", x, *weights)
    same_bits(project("op", x, *weights), whole)
    for row in (0, 127, 128, 256, 519):
        alone = project("op", x[row : row + 1], *weights)
        for name, tensor in whole._asdict().items():
            assert torch.equal(getattr(alone, name), tensor[row : row + 1]), (name, row)
    many = project("op", x.repeat(40, 1), *weights)  # more tiles than multiprocessors: several a block
    for name, tensor in whole._asdict().items():
        assert torch.equal(getattr(many, name), tensor.repeat(40, *[1] * (tensor.dim() - 1))), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_stay_in_their_row(device: torch.device, kernel: str, value: float) -> None:
    x, *weights = drawn(140, 72, 136, device, torch.bfloat16)
    clean = project(kernel, x, *weights)
    dirty = x.clone()
    dirty[5, -3] = value
    result = project(kernel, dirty, *weights)
    kept = [row for row in range(140) if row != 5]
    for name, tensor in clean._asdict().items():
        assert torch.equal(getattr(result, name)[kept], tensor[kept]), name
    expected = reference.gated_projection(dirty, *weights, "silu")[5]
    torch.testing.assert_close(result.out[5].cpu().double(), expected, equal_nan=True)
    projected = (dirty[5].cpu().double() @ weight.cpu().double().T for weight in weights)
    for actual, row in zip(result[1:], (*projected, expected), strict=True):
        torch.testing.assert_close(actual[5].cpu().double(), row.square().sum(), equal_nan=True)


def test_nothing_is_written_outside_of_out(device: torch.device, kernel: str) -> None:
    x, *weights = drawn(131, 72, 136, device, torch.bfloat16)
    room = torch.full((400, 136), 7.0, dtype=torch.bfloat16, device=device)
    kernel_of(OP, kernel)(room[100:231], x, *weights, "silu")
    assert torch.equal(room[100:231], project(kernel, x, *weights).out)
    assert (room[:100] == 7).all() and (room[231:] == 7).all()


def test_no_rows_and_halves_of_a_fused_weight(device: torch.device, kernel: str) -> None:
    x, gate_weight, up_weight = drawn(5, 72, 136, device, torch.bfloat16)
    empty = project(kernel, x[:0], gate_weight, up_weight)
    assert empty.out.shape == (0, 136) and empty.gate_sumsq.shape == (0,)
    halves = torch.cat((gate_weight, up_weight)).chunk(2)
    same_bits(project(kernel, x, *halves), project(kernel, x, gate_weight, up_weight))


def test_weights_that_require_grad_and_inference_tensors(device: torch.device, kernel: str) -> None:
    x, *weights = drawn(5, 72, 136, device, torch.bfloat16)
    expected = project(kernel, x, *weights)
    same_bits(project(kernel, x, *(weight.clone().requires_grad_() for weight in weights)), expected)
    with torch.inference_mode():
        same_bits(project(kernel, x.clone(), *weights), expected)


@pytest.mark.parametrize("kernel", ["op"], indirect=True)
def test_opcheck(device: torch.device, kernel: str) -> None:
    x, *weights = drawn(4, 16, 24, device, torch.bfloat16)
    sums = [torch.zeros(2, device=device) for _ in range(3)]
    for tail in ((), (*sums, 2, 1)):
        arguments = (torch.zeros(4, 24).to(x), x, *weights, "silu", *tail)
        torch.library.opcheck(torch.ops.plop_ext.gated_projection_.default, arguments)


def test_meta_tensors_pass_without_data() -> None:
    wide = torch.empty(2**20, 2**14, device="meta", dtype=torch.bfloat16)
    ops.gated_projection_(wide, wide, wide[: 2**14], wide[: 2**14], "silu")


@pytest.mark.parametrize("kernel", ["op"], indirect=True)
def test_compiles_without_a_graph_break(device: torch.device, kernel: str) -> None:
    torch.compiler.reset()
    x, *weights = drawn(7, 16, 24, device, torch.bfloat16)
    run = torch.compile(lambda x: tuple(project(kernel, x, *weights)), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(x), project(kernel, x, *weights), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    device = torch.device("cuda")
    if not ops.has_gated_projection(device):
        pytest.skip("there is no kernel for this device's compute capability")
    x, *weights = drawn(300, 72, 136, device, torch.bfloat16)
    out, sums = blank((300, 136), x), [blank_sums(300, x, 1, 0) for _ in range(3)]
    ops.gated_projection_(out, x, *weights, "silu", *sums)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gated_projection_(out, x, *weights, "silu", *sums)
    for scale in (2, 3):
        x.mul_(scale)
        graph.replay()
        same_bits(Projected(out, *sums), project("op", x, *weights))


def test_where_the_native_kernel_runs(device: torch.device) -> None:
    if device.type == "cuda":
        assert ops.has_gated_projection(device) == (torch.cuda.get_device_capability(device) == (9, 0))
    else:
        assert not ops.has_gated_projection(device)
