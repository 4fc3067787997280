"""`gain_totals_` against a loop over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from plop_ext import ops
from plop_ext.totals import TOTALS_FIELDS, Totals

KERNELS = {"op": ops.gain_totals_, "pytorch": ops.gain_totals_pytorch}
DTYPES = [torch.float32, torch.float64]
INF, NAN = math.inf, math.nan


def loop(totals: Tensor, sumsq: Tensor, counted: Tensor, offsets: Tensor, records: list[int]) -> Tensor:
    """What the op must add, token by token in Python floats (which are float64)."""
    expected = totals.cpu().clone()
    sums, flags, starts = sumsq.cpu().tolist(), counted.cpu().tolist(), offsets.cpu().tolist()
    for module, in_start, out_start in zip(records[0::3], records[1::3], records[2::3], strict=True):
        for sample in range(totals.shape[1]):
            cell = [0.0] * 5
            for row in range(max(starts[sample], 0), min(starts[sample + 1], len(flags))):
                if not flags[row]:
                    continue
                z, y = sums[in_start + row], sums[out_start + row]
                if not (math.isfinite(z) and math.isfinite(y)):
                    cell[4] += 1
                elif z == 0:
                    cell[3] += 1
                else:
                    cell[0] += math.sqrt(y / z)
                    cell[1] += y / z
                    cell[2] += 1
            expected[module, sample] += torch.tensor(cell, dtype=torch.float64)
    return expected


def arguments(
    device: torch.device,
    *,
    modules: int = 3,
    offsets: tuple[int, ...] = (0, 3, 3, 10),
    rows: int = 10,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Random sums of squares; module m reads input m // 2 and its own output."""
    blocks = (modules + 1) // 2 + modules
    records = []
    for module in reversed(range(modules)):
        records += [module, module // 2 * rows, ((modules + 1) // 2 + module) * rows]
    return {
        "totals": torch.zeros(modules, len(offsets) - 1, 5, dtype=torch.float64, device=device),
        "sumsq": (torch.rand(blocks * rows, dtype=dtype) * 9 + 0.1).to(device),
        "counted": (torch.rand(rows) < 0.7).to(device),
        "offsets": torch.tensor(offsets).to(device),
        "records": records,
    }


def check(given: dict[str, Any], kernel: str = "op", rtol: float = 1e-12) -> Tensor:
    expected = loop(**given)
    assert KERNELS[kernel](**given) is None
    torch.testing.assert_close(given["totals"].cpu(), expected, rtol=rtol, atol=0)
    return given["totals"].cpu()


def test_fields_are_the_five_of_the_table() -> None:
    assert TOTALS_FIELDS == ("sum_gain", "sum_gain_sq", "tokens", "skipped_zero", "skipped_nonfinite")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, offsets",
    [
        (0, (0, 0)),
        (1, (0, 1)),
        (10, (0, 3, 3, 10)),
        (10, (0, 0, 0, 10, 10)),
        (10, (2, 5, 7)),
        (10, (4, 4)),
        (300, (0, 127, 128, 129, 300)),
        (1500, (0, 1500)),
    ],
    ids=str,
)
def test_equals_the_loop(
    device: torch.device, kernel: str, dtype: torch.dtype, rows: int, offsets: tuple[int, ...]
) -> None:
    check(arguments(device, rows=rows, offsets=offsets, dtype=dtype), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_samples_and_no_records(device: torch.device, kernel: str) -> None:
    assert check(arguments(device, offsets=(0,)), kernel).shape == (3, 0, 5)
    given = arguments(device)
    given["records"] = []
    assert (check(given, kernel) == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_offsets_past_the_rows_are_cut(device: torch.device, kernel: str) -> None:
    check(arguments(device, offsets=(-5, 4, 99)), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skipped_tokens_only_add_to_their_count(device: torch.device, kernel: str, dtype: torch.dtype) -> None:
    s_in = [0.0, 4.0, INF, NAN, 1.0, 1.0, 0.0, 0.0, 4.0, 0.0]
    s_out = [0.0, 9.0, 1.0, 1.0, INF, NAN, 5.0, INF, 0.0, 7.0]
    counted = torch.ones(10, dtype=torch.bool)
    counted[9] = False
    given = {
        "totals": torch.zeros(1, 1, 5, dtype=torch.float64, device=device),
        "sumsq": torch.tensor(s_in + s_out, dtype=dtype, device=device),
        "counted": counted.to(device),
        "offsets": torch.tensor([0, 10], device=device),
        "records": [0, 0, 10],
    }
    assert check(given, kernel)[0, 0].tolist() == [1.5, 2.25, 2.0, 2.0, 5.0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_calls_add_up_and_leave_other_modules_alone(device: torch.device, kernel: str) -> None:
    given = arguments(device, modules=4)
    given["records"] = given["records"][:3]
    given["totals"][:] = 0.25
    once = check(given, kernel).clone()
    twice = check(given, kernel)
    assert once[3, 0, 2] > 0.25
    torch.testing.assert_close(twice - once, once - 0.25)
    assert (twice[:3] == 0.25).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("modules", [127, 128, 129, 300])
def test_more_records_than_one_launch_takes(device: torch.device, kernel: str, modules: int) -> None:
    totals = check(arguments(device, modules=modules), kernel)
    tokens = Totals(totals.numpy()).tokens
    assert (tokens.sum(axis=1) == tokens[0].sum()).all()


def test_more_samples_than_one_axis_of_a_grid(device: torch.device) -> None:
    rows = 70_000
    given = arguments(device, modules=1, rows=rows, offsets=tuple(range(rows + 1)))
    KERNELS["op"](**given)
    gain_sq = given["sumsq"][rows:].double() / given["sumsq"][:rows].double()
    expected = torch.where(given["counted"], gain_sq.sqrt(), 0.0)
    torch.testing.assert_close(given["totals"][0, :, 0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_taken_in_float64(device: torch.device, dtype: torch.dtype) -> None:
    """In float32 a sum of 2^20 gains and a small rest would lose the rest."""
    rows = 2**18
    sumsq = torch.ones(2 * rows, dtype=dtype)
    sumsq[rows] = 2.0**80
    sumsq[rows + 1 :: 2] = 1 + 2.0**-20
    given = {
        "totals": torch.zeros(1, 1, 5, dtype=torch.float64, device=device),
        "sumsq": sumsq.to(device),
        "counted": torch.ones(rows, dtype=torch.bool, device=device),
        "offsets": torch.tensor([0, rows], device=device),
        "records": [0, 0, rows],
    }
    ops.gain_totals_(**given)
    gains = sumsq[rows:].double().sqrt()
    assert float(given["totals"][0, 0, 0]) == pytest.approx(float(gains.sum()), rel=1e-13)
    assert float(given["totals"][0, 0, 0]) - 2.0**40 == pytest.approx(float(gains[1:].sum()), rel=1e-3)
    assert given["totals"][0, 0, 2] == rows


def test_bits_repeat_and_do_not_depend_on_other_cells(device: torch.device) -> None:
    given = arguments(device, modules=5, rows=900, offsets=(0, 300, 900))
    ops.gain_totals_(**given)
    first = given["totals"].clone()
    for _ in range(3):
        given["totals"].zero_()
        ops.gain_totals_(**given)
        assert torch.equal(given["totals"], first)
    alone = {**given, "totals": torch.zeros_like(first), "records": given["records"][6:9]}
    ops.gain_totals_(**alone)
    module = given["records"][6]
    assert torch.equal(alone["totals"][module], first[module])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        given["totals"].zero_()
        ops.gain_totals_(**given)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(given["totals"], first)


def test_requires_grad_and_inference_mode(device: torch.device) -> None:
    given = arguments(device)
    given["sumsq"].requires_grad_()
    expected = loop(**given)
    with torch.inference_mode():
        ops.gain_totals_(**given)
    ops.gain_totals_(**{**given, "totals": given["totals"]})
    torch.testing.assert_close(given["totals"].cpu(), expected * 2, rtol=1e-12, atol=0)


def test_opcheck(device: torch.device) -> None:
    for given in (
        arguments(device),
        arguments(device, dtype=torch.float64),
        arguments(device, rows=0, offsets=(0, 0)),
    ):
        torch.library.opcheck(torch.ops.plop_ext.gain_totals_.default, tuple(given.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(device: torch.device, backend: str) -> None:
    given = arguments(device)
    records = given.pop("records")

    def add(totals: Tensor, sumsq: Tensor, counted: Tensor, offsets: Tensor) -> Tensor:
        ops.gain_totals_(totals, sumsq, counted, offsets, records)
        return totals.sum()

    expected = loop(**given, records=records)
    total = torch.compile(add, fullgraph=True, backend=backend)(**given)
    torch.testing.assert_close(given["totals"].cpu(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(total.cpu(), expected.sum(), rtol=1e-12, atol=0)


def test_meta_tensors_pass_without_data() -> None:
    ops.gain_totals_(**{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments("cpu").items()})
