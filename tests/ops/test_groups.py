"""`gain_totals_` with several groups per record (experts), and `row_sumsq_` with one bias per inner row (heads)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from plop_ext import ops

GAIN_TOTALS = {"op": ops.gain_totals_, "pytorch": ops.gain_totals_pytorch}
ROW_SUMSQ = {"op": ops.row_sumsq_, "pytorch": ops.row_sumsq_pytorch}
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def routed(
    device: torch.device, counts: list[list[int]], *, dtype: torch.dtype = torch.float32, unowned: int = 3
) -> dict[str, Any]:
    """Rows of `counts`[group][sample] each, two records, and `unowned` rows past the last offset."""
    sizes = torch.tensor(counts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.flatten().cumsum(0)])
    rows = int(offsets[-1]) + unowned
    groups, samples = sizes.shape
    return {
        "totals": torch.zeros(2 * groups + 1, samples, 5, dtype=torch.float64, device=device),
        "sumsq": (torch.rand(3 * rows, dtype=dtype) * 9 + 0.1).to(device),
        "counted": (torch.rand(rows) < 0.7).to(device),
        "offsets": offsets.to(device),
        "records": [groups, 0, 2 * rows, 0, 0, rows],
    }


def expected_totals(given: dict[str, Any], groups: int) -> Tensor:
    """Each group as a dense layer of its own, summed row by row."""
    expected = given["totals"].cpu().clone()
    samples = expected.shape[1]
    sums, counted, offsets = given["sumsq"].cpu().double(), given["counted"].cpu(), given["offsets"].tolist()
    records = given["records"]
    for module, in_start, out_start in zip(records[0::3], records[1::3], records[2::3], strict=True):
        for group in range(groups):
            for sample in range(samples):
                begin, end = offsets[group * samples + sample : group * samples + sample + 2]
                for row in range(begin, end):
                    if counted[row]:
                        gain_sq = sums[out_start + row] / sums[in_start + row]
                        fields = [float(gain_sq) ** 0.5, float(gain_sq), 1.0, 0.0, 0.0]
                        expected[module + group, sample] += torch.tensor(fields, dtype=torch.float64)
    return expected


@pytest.mark.parametrize("kernel", GAIN_TOTALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "counts",
    [[[5, 0, 7]], [[1], [0], [4]], [[0, 3], [0, 0], [200, 1], [0, 0]], [[2, 3, 4]] * 7],
    ids=["one group", "one sample", "empty groups", "seven groups"],
)
def test_groups_equal_the_loop(device: torch.device, kernel: str, dtype: torch.dtype, counts: list[list[int]]) -> None:
    given = routed(device, counts, dtype=dtype)
    expected = expected_totals(given, len(counts))
    GAIN_TOTALS[kernel](**given)
    torch.testing.assert_close(given["totals"].cpu(), expected, rtol=1e-12, atol=0)
    assert (given["totals"][-1] == 0).all()


@pytest.mark.parametrize("kernel", GAIN_TOTALS)
def test_no_rows_no_samples(device: torch.device, kernel: str) -> None:
    given = routed(device, [[0, 0], [0, 0]], unowned=0)
    GAIN_TOTALS[kernel](**given)
    assert (given["totals"] == 0).all()
    given["totals"] = torch.zeros(5, 0, 5, dtype=torch.float64, device=device)
    given["offsets"] = torch.zeros(1, dtype=torch.long, device=device)
    GAIN_TOTALS[kernel](**given)


def test_more_cells_than_one_axis_of_a_grid(device: torch.device) -> None:
    given = routed(device, [[1] * 300] * 300)
    GAIN_TOTALS["op"](**given)
    rows = len(given["counted"])
    gains = (given["sumsq"][rows : 2 * rows].double() / given["sumsq"][:rows].double()).sqrt()
    gains = torch.where(given["counted"], gains, 0.0)[: 300 * 300].view(300, 300)
    torch.testing.assert_close(given["totals"][:300, :, 0], gains, rtol=1e-12, atol=0)


def test_bits_repeat_with_groups(device: torch.device) -> None:
    given = routed(device, [[400, 30], [0, 900], [7, 7]])
    GAIN_TOTALS["op"](**given)
    first = given["totals"].clone()
    for threads in (1, torch.get_num_threads()):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            given["totals"].zero_()
            GAIN_TOTALS["op"](**given)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(given["totals"], first)


def test_opcheck(device: torch.device) -> None:
    given = routed(device, [[3, 2], [0, 4]])
    torch.library.opcheck(torch.ops.plop_ext.gain_totals_.default, tuple(given.values()))
    arguments = (torch.zeros(12, device=device), torch.rand(3, 4, 6, device=device), torch.rand(4, 6, device=device))
    torch.library.opcheck(torch.ops.plop_ext.row_sumsq_.default, arguments)


@pytest.mark.parametrize("kernel", [ops.gain_totals_, ops.gain_totals_fake, ops.gain_totals_pytorch])
@pytest.mark.parametrize(
    "change, text",
    [
        ({"offsets": torch.tensor([0, 1, 2, 3])}, "offsets must have one element and 2 per group, got 4"),
        ({"records": [4, 0, 0]}, "records must name modules in [0, 4), got 4"),
        ({"records": [0, 0, 0, 1, 0, 0]}, "records must name each module once, got module 1 twice"),
    ],
    ids=["no whole group", "last group outside", "groups overlap"],
)
def test_errors(device: torch.device, kernel: Any, change: dict[str, Any], text: str) -> None:
    given = {**routed(device, [[3, 2], [0, 4]]), **change}
    given["offsets"] = given["offsets"].to(device)
    with pytest.raises(RuntimeError, match=re.escape(f"gain_totals_: {text}")):
        kernel(**given)
    assert (given["totals"] == 0).all()


@pytest.mark.parametrize("kernel", ROW_SUMSQ)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 4, 8), (1, 3, 64), (7, 1, 16), (6, 5, 7), (3, 2, 300)], ids=str)
@pytest.mark.parametrize("step", [1, 3])
def test_one_bias_per_head(
    device: torch.device, kernel: str, dtype: torch.dtype, shape: tuple[int, int, int], step: int
) -> None:
    """Heads of a packed projection: the q, k and v of each head lie side by side, so rows are views with gaps."""
    tokens, heads, width = shape
    packed = torch.randn(tokens, heads, 3, width).to(device, dtype)
    bias = (torch.randn(heads, 3, width) * 3).to(device, dtype)
    x, shift = packed[:, :, 1], bias[:, 1].contiguous()
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (x.double() - shift.double()).square().sum(-1).reshape(-1)[step - 1 :: step]
    out = torch.full(expected.shape, -1.0, dtype=sum_dtype, device=device)
    ROW_SUMSQ[kernel](out, x, shift, step, step - 1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0)
    if dtype in (torch.float16, torch.bfloat16):
        wide = torch.empty_like(out)
        ROW_SUMSQ[kernel](wide, x, shift.float(), step, step - 1)
        torch.testing.assert_close(wide, out, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", [ops.row_sumsq_, ops.row_sumsq_fake, ops.row_sumsq_pytorch])
@pytest.mark.parametrize("shape", [(3, 6), (4, 5), (6, 4)], ids=str)
def test_a_bias_per_head_must_fit(device: torch.device, kernel: Any, shape: tuple[int, int]) -> None:
    x, bias = torch.ones(2, 4, 6, device=device), torch.ones(shape, device=device)
    text = f"row_sumsq_: bias must have 24 elements, got {bias.numel()}"
    with pytest.raises(RuntimeError, match=re.escape(text)):
        kernel(torch.zeros(8, device=device), x, bias)
