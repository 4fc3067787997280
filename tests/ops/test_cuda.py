"""The ops where CUDA has more than one order of things: side streams, graphs, a second device. No host ever waits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plop_ext import ops

pytestmark = pytest.mark.gpu

ROWS, WIDTH = 4096, 1024


def both_ops(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of the rows of x and y, and the totals of two samples made of them."""
    rows = len(x)
    sums = torch.empty(2 * rows, device=x.device)
    totals = torch.zeros(1, 2, 5, dtype=torch.float64, device=x.device)
    counted = torch.ones(rows, dtype=torch.bool, device=x.device)
    offsets = torch.arange(3, device=x.device) * (rows // 2)
    run_into(sums, totals, counted, offsets, x, y)
    return sums, totals


def run_into(sums: Tensor, totals: Tensor, counted: Tensor, offsets: Tensor, x: Tensor, y: Tensor) -> None:
    rows = len(x)
    ops.row_sumsq_(sums[:rows], x)
    ops.row_sumsq_(sums[rows:], y)
    ops.gain_totals_(totals, sums, counted, offsets, [0, 0, rows])


def expected(x: Tensor, y: Tensor) -> Tensor:
    """The totals [1, 2, 5] by float64 norms."""
    gains = (y.double().norm(dim=1) / x.double().norm(dim=1)).view(2, -1)
    zero = torch.zeros(2, dtype=torch.float64, device=x.device)
    return torch.stack((gains.sum(1), gains.square().sum(1), zero + gains.shape[1], zero, zero), dim=1)[None]


def test_the_ops_run_on_the_current_stream() -> None:
    x, y = torch.randn(ROWS, WIDTH, device="cuda"), torch.randn(ROWS, WIDTH, device="cuda")
    late_x, late_y = torch.zeros_like(x), torch.zeros_like(y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # another stream would read the zeros meanwhile
        late_x.copy_(x)
        late_y.copy_(y)
        _, totals = both_ops(late_x, late_y)
    stream.synchronize()
    torch.testing.assert_close(totals, expected(x, y), rtol=1e-5, atol=0)


def test_the_ops_do_not_synchronize() -> None:
    x, y = torch.randn(ROWS, WIDTH, device="cuda"), torch.randn(ROWS, WIDTH, device="cuda")
    both_ops(x, y)
    done = torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    both_ops(x, y)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_a_captured_graph_replays_on_new_values() -> None:
    x, y = torch.randn(ROWS, WIDTH, device="cuda"), torch.randn(ROWS, WIDTH, device="cuda")
    sums = torch.empty(2 * ROWS, device="cuda")
    totals = torch.zeros(1, 2, 5, dtype=torch.float64, device="cuda")
    counted = torch.ones(ROWS, dtype=torch.bool, device="cuda")
    offsets = torch.tensor([0, ROWS // 2, ROWS], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_into(sums, totals, counted, offsets, x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_into(sums, totals, counted, offsets, x, y)
    totals.zero_()
    wanted = torch.zeros_like(totals)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        y.copy_(torch.randn_like(y))
        graph.replay()
        wanted += expected(x, y)
    torch.testing.assert_close(totals, wanted, rtol=1e-5, atol=0)


def test_many_records_take_several_launches() -> None:
    rows, modules = 64, 300  # a launch takes 128
    sums = torch.rand(rows * (modules + 1), device="cuda") + 0.1
    totals = torch.zeros(modules, 4, 5, dtype=torch.float64, device="cuda")
    counted = torch.rand(rows, device="cuda") < 0.7
    offsets = torch.tensor([0, 10, 10, 50, rows], device="cuda")
    records = [number for module in range(modules) for number in (module, 0, rows * (module + 1))]
    host = totals.cpu()
    ops.gain_totals_(host, sums.cpu(), counted.cpu(), offsets.cpu(), records)
    ops.gain_totals_(totals, sums, counted, offsets, records)
    torch.testing.assert_close(totals.cpu(), host, rtol=1e-12, atol=0)


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    x, y = torch.randn(64, 96, device="cuda:1"), torch.randn(64, 96, device="cuda:1")
    with torch.cuda.device(0):
        _, totals = both_ops(x, y)
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(totals, expected(x, y), rtol=1e-5, atol=0)
