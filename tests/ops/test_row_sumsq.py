"""`row_sumsq_`: values, layouts, bitwise guarantees, and torch's own checks. Errors: test_ops_errors.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plop_ext import ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
SHAPES = [
    (0, 8),
    (1, 1),
    (1, 4097),
    (3, 0),
    (4, 1),
    (7, 3),
    (5, 63),
    (5, 65),
    (2, 127),
    (3, 1031),
    (2, 33001),
    (2, 70000),
    (0, 5, 8),
    (2, 3, 40),
    (3, 1, 4097),
    (1, 4, 17),
]
RTOL = 1e-5


def oracle(x: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0) -> Tensor:
    """Sum of squares of each row read, row by row, in float64 on the CPU."""
    rows = x.detach().cpu().double().flatten(0, -2) if x.shape[-1] else x.new_zeros(x.shape[:-1].numel(), 0)
    shift = 0 if bias is None else bias.detach().cpu().double()
    chosen = [rows[row] for row in range(len(rows)) if row >= phase and (row - phase) % step == 0]
    return torch.tensor([float(((row.cpu().double() - shift) ** 2).sum()) for row in chosen], dtype=torch.float64)


def run(
    x: Tensor,
    bias: Tensor | None = None,
    step: int = 1,
    phase: int = 0,
    op: Callable[..., None] = ops.row_sumsq_,
) -> Tensor:
    """The op's result; `out` starts as NaN, so that a row it skips shows."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = ops.rows_read(x.shape[:-1].numel(), step, phase)
    out = torch.full((rows,), torch.nan, dtype=dtype, device=x.device)
    assert op(out, x, bias, step, phase) is None
    return out


def check(x: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0) -> None:
    torch.testing.assert_close(
        run(x, bias, step, phase).cpu().double(), oracle(x, bias, step, phase), rtol=RTOL, atol=0
    )


def aligned(x: Tensor) -> Tensor:
    """`x` [T, K] in rows that each start at a multiple of 16 bytes."""
    rows, width = x.shape
    whole = torch.full((rows, width + (-width) % 8 + 8), 7.0, dtype=x.dtype, device=x.device)
    whole[:, :width] = x
    return whole[:, :width]


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of `x` [T, K] in memory layouts that take other paths through a kernel."""
    rows, width = x.shape
    wide = torch.full((rows, 2 * width + 3), 7.0, dtype=x.dtype, device=x.device)
    wide[:, 1 : 1 + width] = x
    sparse = torch.full((rows, 2 * width), 7.0, dtype=x.dtype, device=x.device)
    sparse[:, ::2] = x
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(rows, width)
    shifted.copy_(x)
    return {
        "row stride": wide[:, 1 : 1 + width],
        "row stride, aligned": aligned(x),
        "inner stride": sparse[:, ::2],
        "transposed": x.T.contiguous().T,
        "misaligned": shifted,
        "[T, 1, K]": x.unsqueeze(1),
        "[1, T, K]": x.unsqueeze(0),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_oracle(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    check(x)
    check(x, torch.randn(shape[-1], device=device).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 64, 1031, 2307])
def test_a_float32_bias_is_not_rounded(device: torch.device, dtype: torch.dtype, width: int) -> None:
    x, bias = torch.randn(4, width, device=device).to(dtype), torch.randn(width, device=device) * 3
    check(x, bias)
    check(aligned(x), bias)
    check(torch.randn(2, 9, width, device=device).to(dtype)[:, 1::2], bias)


@pytest.mark.parametrize("step, phase", [(1, 0), (2, 0), (2, 1), (3, 2), (8, 5), (50, 49), (2**40, 7), (2**63 - 1, 2)])
@pytest.mark.parametrize("shape", [(11, 37), (3, 5, 37), (4, 1, 37)], ids=str)
def test_step_and_phase(device: torch.device, shape: tuple[int, ...], step: int, phase: int) -> None:
    x = torch.randn(shape, device=device)
    check(x, None, step, phase)
    check(x.transpose(0, -2), torch.randn(37, device=device), step, phase)


def test_rows_read_counts_what_slicing_reads() -> None:
    for rows in range(6):
        for step in range(1, 5):
            assert [ops.rows_read(rows, step, phase) for phase in range(step)] == [
                len(range(rows)[phase::step]) for phase in range(step)
            ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_dimensions_that_cannot_be_merged(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(6, 5, 80, device=device).to(dtype)
    for view in (x[:, 1:4], x[::2, :, 8:72], x.transpose(0, 1), x[:, :, ::2], x.permute(2, 1, 0), x[:, 1:2], x[2:3]):
        check(view)
        check(view, torch.randn(view.shape[-1], device=device).to(dtype), 2, 1)


def test_rows_that_share_memory(device: torch.device) -> None:
    check(torch.randn(1, 33, device=device).expand(9, 33))
    check(torch.randn(1, 1, 33, device=device).expand(2, 9, 33))
    check(torch.randn(5, 1, device=device).expand(5, 700))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Among others widths that rounds of loads, deep or not, and chunks do not divide.
@pytest.mark.parametrize("width", [1, 8, 31, 130, 332, 899, 2312, 4096, 4097, 4323, 8003, 70001])
def test_bits_depend_on_the_values_of_the_row_alone(device: torch.device, dtype: torch.dtype, width: int) -> None:
    x = torch.randn(5, width, device=device).to(dtype)
    bias = torch.randn(width, device=device).to(dtype)
    expected, shifted = run(x), run(x, bias)
    assert torch.equal(run(x), expected)
    for name, view in layouts(x).items():
        assert torch.equal(run(view), expected), name
        assert torch.equal(run(view, bias), shifted), name
    for row in range(5):
        assert torch.equal(run(x[row : row + 1]), expected[row : row + 1])
    if width <= 4323:
        many = x.repeat(1000, 1)  # a CUDA kernel reads few rows another way
        for view in (many, aligned(many)):
            assert torch.equal(run(view), expected.repeat(1000))
            assert torch.equal(run(view, bias), shifted.repeat(1000))
    assert torch.equal(run(x, None, 2, 1), expected[1::2])
    misaligned_bias = torch.cat([bias[:1], bias])[1:]
    assert torch.equal(run(x, misaligned_bias), shifted)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    x, before = torch.randn(4000, 129), torch.get_num_threads()
    expected = run(x)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row(device: torch.device, dtype: torch.dtype) -> None:
    for width in (3, 64, 1031, 40000):
        x = torch.ones(4, width, device=device, dtype=dtype)
        x[1, -1], x[2, 0] = torch.nan, -torch.inf
        for view in (x, x.T.contiguous().T):
            result = run(view).cpu()
            assert result[0] == result[3] == width
            assert result[1].isnan() and result[2] == torch.inf
    x[2, 1] = torch.nan
    assert run(x)[2].isnan()
    assert run(torch.ones(1, 9, device=device, dtype=dtype), x[2, :9].contiguous()).isnan()


def test_every_float16_value(device: torch.device) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    expected = every.double().square()
    for x in (every[:, None], every[:, None].expand(-1, 2)[:, ::2]):
        result = run(x.to(device)).cpu().double()
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=0, equal_nan=True)
    rows = every.view(-1, 64).to(device)
    torch.testing.assert_close(run(rows).cpu().double(), oracle(rows), rtol=1e-6, atol=0, equal_nan=True)


def test_every_bfloat16_value_whose_square_float32_holds(device: torch.device) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    squares = every.double().square()
    inside = ~((squares > 0) & (squares < 2.0**-126))
    expected = squares.float().double()  # overflows to infinity above 1.8e19, as documented
    result = run(every[:, None].to(device)).cpu().double()
    torch.testing.assert_close(result[inside], expected[inside], rtol=1e-6, atol=0, equal_nan=True)


def test_overflow_of_float32_is_infinity_and_float64_holds_it(device: torch.device) -> None:
    x = torch.tensor([[1.7e19, 0.0], [2e19, 0.0], [1.4e19, 1.4e19]], device=device)
    assert run(x).isinf().tolist() == [False, True, True]
    check(x.double())


def test_long_rows_stay_accurate(device: torch.device) -> None:
    check(torch.randn(2, 1_000_003, device=device) + 3)


@pytest.mark.parametrize("grad", [True, False])
def test_inputs_that_require_grad(device: torch.device, grad: bool) -> None:
    x = torch.randn(3, 7, device=device, requires_grad=True)
    bias = torch.randn(7, device=device, requires_grad=True)
    with torch.set_grad_enabled(grad):
        out = run(x * 2, bias)
    assert not out.requires_grad and out.grad_fn is None
    torch.testing.assert_close(out.cpu().double(), oracle(x * 2, bias), rtol=RTOL, atol=0)


def test_inference_tensors(device: torch.device) -> None:
    out = torch.zeros(3, device=device)
    with torch.inference_mode():
        x = torch.randn(3, 7, device=device)
        ops.row_sumsq_(out, x)
    torch.testing.assert_close(out.cpu().double(), oracle(x), rtol=RTOL, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_pytorch_kernel_equals_the_native_one(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    bias = torch.randn(shape[-1], device=device)
    bias = bias.double() if dtype == torch.float64 else bias
    for arguments in ((x,), (x, bias), (x, bias, 3, 1), (x.transpose(0, -2), None, 2)):
        native, pytorch = run(*arguments), run(*arguments, op=ops.row_sumsq_pytorch)
        torch.testing.assert_close(pytorch, native, rtol=RTOL, atol=0)


def test_opcheck(device: torch.device) -> None:
    op = torch.ops.plop_ext.row_sumsq_.default
    for x in (torch.randn(5, 9), torch.randn(2, 3, 9).half(), torch.randn(9, 5).double().T, torch.randn(0, 9)):
        rows = x.shape[:-1].numel()
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        bias = torch.randn(9, dtype=x.dtype, device=device)
        for tail in ((None, 1, 0), (bias, 2, 1)):
            out = torch.zeros(ops.rows_read(rows, *tail[1:]), dtype=dtype, device=device)
            torch.library.opcheck(op, (out, x.to(device), *tail))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(device: torch.device, backend: str) -> None:
    def sums(x: Tensor, bias: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], device=x.device)
        ops.row_sumsq_(out, x * 2, bias)
        return out + 1

    compiled = torch.compile(sums, fullgraph=True, backend=backend, dynamic=True)
    for rows in (4, 7, 1):
        x, bias = torch.randn(rows, 19, device=device), torch.randn(19, device=device)
        expected = oracle(x * 2, bias) + 1
        torch.testing.assert_close(compiled(x, bias).cpu().double(), expected, rtol=RTOL, atol=0)


def test_meta_tensors_pass_without_data() -> None:
    x = torch.empty(2**20, 2**20, device="meta")
    ops.row_sumsq_(torch.empty(2**20, device="meta"), x, torch.empty(2**20, device="meta"))


def test_offsets_beyond_32_bits() -> None:
    """Elements 2^31 and more apart: a 32-bit offset would read elsewhere. Most of the memory is never touched."""
    stride = 2**31 + 3
    values = torch.empty(stride + 8, dtype=torch.float16)
    for shape, strides in (((2, 5), (stride, 1)), ((2, 1, 5), (stride, 5, 1)), ((2, 2, 2), (stride, 3, 1))):
        x = values.as_strided(shape, strides)
        x.copy_(torch.randn(shape))
        check(x)
        check(x, torch.randn(shape[-1]), 2, 1)
        check(x.transpose(0, -1))


def test_more_than_2_31_elements() -> None:
    row = torch.randn(1, 64)
    out = run(row.expand(2**25 + 8, 64), None, 2**20, 3)
    assert torch.equal(out, run(row).expand(33))
