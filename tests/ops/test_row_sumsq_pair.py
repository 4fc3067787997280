"""`row_sumsq_pair_`: bitwise identical to two `row_sumsq_` calls, in one launch or two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plop_ext import ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Widths of x and y on both sides of every width class of the CUDA kernel; of one class and of two.
WIDTHS = [
    (1, 1),
    (0, 3),
    (16, 40),
    (64, 1032),
    (520, 4096),
    (960, 2560),
    (4304, 8000),
    (4096, 14336),
    (1031, 2049),
    (513, 8200),
    (16384, 16392),
    (32768, 32776),
    (40000, 70000),
]


def run(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    step: int = 1,
    phase: int = 0,
    op: Callable[..., None] = ops.row_sumsq_pair_,
) -> Tensor:
    """The op's result [2, R]; `out` starts as NaN, so that a row it skips shows."""
    rows = ops.rows_read(x.shape[:-1].numel(), step, phase)
    out = torch.full((2 * rows,), torch.nan, dtype=ops.sum_dtype(x.dtype), device=x.device)
    assert op(out, x, y, bias, step, phase) is None
    return out.view(2, rows)


def one_by_one(x: Tensor, y: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0) -> Tensor:
    rows = ops.rows_read(x.shape[:-1].numel(), step, phase)
    out = torch.full((2, rows), torch.nan, dtype=ops.sum_dtype(x.dtype), device=x.device)
    ops.row_sumsq_(out[0], x, None, step, phase)
    ops.row_sumsq_(out[1], y, bias, step, phase)
    return out


def check(x: Tensor, y: Tensor, bias: Tensor | None = None, step: int = 1, phase: int = 0) -> None:
    torch.testing.assert_close(
        run(x, y, bias, step, phase), one_by_one(x, y, bias, step, phase), rtol=0, atol=0, equal_nan=True
    )


def randn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_two_calls(device: torch.device, dtype: torch.dtype, widths: tuple[int, int]) -> None:
    for rows in (1, 4, 7):
        x, y = (randn(rows, width, dtype=dtype, device=device) for width in widths)
        bias = randn(widths[1], dtype=dtype, device=device)
        check(x, y)
        check(x, y, bias)
        check(x, y, bias.to(ops.sum_dtype(dtype)), 2, 1)
        assert not run(x, y, bias).isnan().any()


@pytest.mark.parametrize("step, phase", [(1, 0), (2, 1), (3, 2), (8, 5), (50, 49), (2**40, 7), (2**63 - 1, 2)])
@pytest.mark.parametrize("shapes", [((11,), (11,)), ((3, 5), (3, 5)), ((12,), (3, 4)), ((1, 9), (9, 1))], ids=str)
def test_step_and_phase(
    device: torch.device, shapes: tuple[tuple[int, ...], tuple[int, ...]], step: int, phase: int
) -> None:
    x = randn(*shapes[0], 640, dtype=torch.bfloat16, device=device)
    y = randn(*shapes[1], 1024, dtype=torch.bfloat16, device=device)
    check(x, y, None, step, phase)
    check(x, y, randn(1024, dtype=torch.bfloat16, device=device), step, phase)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device: torch.device, dtype: torch.dtype) -> None:
    wide = randn(6, 5, 2064, dtype=dtype, device=device)
    bias = randn(1032, dtype=dtype, device=device)
    views = [
        wide[:, :, :1032].contiguous(),
        wide[:, :, :1032],  # row stride
        wide[:, :, 1 : 1 + 1032],  # misaligned
        wide[:, :, ::2],  # strided elements
        wide[:, :, :1032].transpose(0, 1),  # two row axes
        wide[:, 1:4, 1032:].expand(6, 3, 1032).transpose(0, 1),
        wide[::2, :, 8:1040].flatten(0, 1),
        wide[:1, :, :1032].expand(6, 5, 1032),
    ]
    for x in views:
        for y in views:
            if x.shape[:-1].numel() == y.shape[:-1].numel():
                check(x, y)
                check(x, y, bias, 3, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bias_per_inner_row(device: torch.device, dtype: torch.dtype) -> None:
    x, y = randn(20, 640, dtype=dtype, device=device), randn(5, 4, 640, dtype=dtype, device=device)
    bias = randn(4, 640, dtype=dtype, device=device)
    check(x, y, bias)
    check(x, y, bias.to(ops.sum_dtype(dtype)), 3, 2)


def test_a_bias_that_is_not_aligned(device: torch.device) -> None:
    x, y = (randn(5, 1024, dtype=torch.float16, device=device) for _ in range(2))
    check(x, y, randn(1025, dtype=torch.float16, device=device)[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row(device: torch.device, dtype: torch.dtype) -> None:
    for width in (3, 64, 1032):
        x, y = (torch.ones(4, width, device=device, dtype=dtype) for _ in range(2))
        x[1, -1], y[2, 0] = torch.nan, -torch.inf
        result = run(x, y).cpu()
        assert result.isnan().nonzero().tolist() == [[0, 1]] and result.isinf().nonzero().tolist() == [[1, 2]]
        assert (result[result.isfinite()] == width).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [4096, 4097])
@pytest.mark.parametrize("width", [2312, 4088, 4096, 4104])
def test_many_rows(device: torch.device, width: int, rows: int, bias: bool) -> None:
    """Both sides of where CUDA reads narrow rows another way, and takes a launch per tensor if they have a bias."""
    x = randn(rows, 2312, dtype=torch.bfloat16, device=device)
    y = randn(rows, width, dtype=torch.bfloat16, device=device)
    check(x, y, randn(width, dtype=torch.bfloat16, device=device) if bias else None)


def test_no_rows(device: torch.device) -> None:
    for x, y in ((torch.ones(0, 600), torch.ones(0, 700)), (torch.ones(2, 0, 8), torch.ones(0, 3, 5))):
        ops.row_sumsq_pair_(torch.ones(0, device=device), x.to(device), y.to(device))
    ops.row_sumsq_pair_(torch.ones(0, device=device), *torch.ones(2, 3, 8, device=device).unbind(0), None, 9, 5)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    x, y, before = torch.randn(4000, 129), torch.randn(4000, 65), torch.get_num_threads()
    expected = one_by_one(x, y)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(x, y), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_common_rows_take_one_launch(dtype: torch.dtype, bias: bool) -> None:
    x, narrow, wide = (torch.ones(9000, width, device="cuda", dtype=dtype) for width in (960, 1024, 4104))
    for y, together in ((narrow, not bias), (wide, True)):
        shift = y[0].clone() if bias else None
        assert launches(x[:9], y[:9], shift) == ["pair"]
        assert launches(x, y, shift) == (["pair"] if together else ["one"] * 2)
        for other in (x[:9, 1:], x[:9, :8]):
            assert launches(other, y[:9], shift) == ["one"] * 2


def launches(x: Tensor, y: Tensor, bias: Tensor | None) -> list[str]:
    """The kernels that one call runs: "pair" or "one"."""
    run(x, y, bias)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(x, y, bias)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "row_sumsq" in event.name and "_kernel" in event.name]
    return ["pair" if "row_sumsq_pair_kernel" in name else "one" for name in kernels]


@pytest.mark.parametrize("grad", [True, False])
def test_inputs_that_require_grad(device: torch.device, grad: bool) -> None:
    x, y, bias = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((3, 7), (3, 9), (9,)))
    with torch.set_grad_enabled(grad):
        out = run(x * 2, y * 2, bias)
    assert not out.requires_grad and out.grad_fn is None
    assert torch.equal(out, one_by_one(x.detach() * 2, y.detach() * 2, bias.detach()))


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_pytorch_kernel_is_that_of_two_calls(
    device: torch.device, widths: tuple[int, int], dtype: torch.dtype
) -> None:
    x, y = (randn(5, width, dtype=dtype, device=device) for width in widths)
    bias = randn(widths[1], dtype=dtype, device=device)
    for tail in ((None, 1, 0), (bias, 3, 1)):
        pytorch = run(x, y, *tail, op=ops.row_sumsq_pair_pytorch)
        rows, expected = pytorch.shape[1], torch.full_like(pytorch, torch.nan)
        assert rows == ops.rows_read(5, *tail[1:])
        ops.row_sumsq_pytorch(expected[0], x, None, *tail[1:])
        ops.row_sumsq_pytorch(expected[1], y, *tail)
        assert torch.equal(pytorch, expected)
        torch.testing.assert_close(run(x, y, *tail), pytorch, rtol=1e-5, atol=0)


def test_opcheck(device: torch.device) -> None:
    op = torch.ops.plop_ext.row_sumsq_pair_.default
    cases = [
        (torch.randn(5, 9), torch.randn(5, 9)),
        (torch.randn(2, 3, 17).half(), torch.randn(6, 9).half()),
        (torch.randn(9, 5).double().T, torch.randn(9, 5).double().T),
        (torch.randn(0, 9), torch.randn(0, 9)),
    ]
    for x, y in cases:
        bias = torch.randn(9, dtype=x.dtype, device=device)
        for tail in ((None, 1, 0), (bias, 2, 1)):
            rows = ops.rows_read(x.shape[:-1].numel(), *tail[1:])
            out = torch.zeros(2 * rows, dtype=ops.sum_dtype(x.dtype), device=device)
            torch.library.opcheck(op, (out, x.to(device), y.to(device), *tail))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_is_plain_pytorch(device: torch.device, backend: str) -> None:
    targets: set[str] = set()

    def noting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        targets.update(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(ops.row_sumsq_pair_, fullgraph=True, backend=noting)
    for rows, step, phase in ((6, 1, 0), (6, 4, 3), (7, 2, 1)):
        x, y = torch.randn(rows, 19, device=device), torch.randn(rows, 23, device=device)
        bias = torch.randn(23, device=device)
        for shift in (None, bias):
            torch.testing.assert_close(
                run(x, y, shift, step, phase, op=compiled), one_by_one(x, y, shift, step, phase), rtol=1e-5, atol=0
            )
    assert targets and not any("plop_ext" in target for target in targets)


@pytest.mark.parametrize("out, y_rows", [(7, 3), (5, 3), (8, 3), (7, 4), (6, 4)])
def test_compiled_it_refuses_sizes_that_would_broadcast(device: torch.device, out: int, y_rows: int) -> None:
    sums, x, y = torch.zeros(out, device=device), torch.ones(3, 8, device=device), torch.ones(y_rows, 8, device=device)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        torch.compile(ops.row_sumsq_pair_, backend="aot_eager", fullgraph=True)(sums, x, y)


def test_meta_tensors_pass_without_data() -> None:
    x, y = torch.empty(2**20, 2**20, device="meta"), torch.empty(2**10, 2**10, 3, device="meta")
    ops.row_sumsq_pair_(torch.empty(2**21, device="meta"), x, y, torch.empty(3, device="meta"))
