"""The fused ops: the values on which the result of a row may depend."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.support.fused_ops import (
    DTYPES,
    FUSED_OPS,
    KERNELS,
    WIDTHS,
    add_rms_norm,
    blank,
    gated_activation,
    heads_of_fused,
    kernel_of,
    randn,
    rotary,
    runs,
    skip_without_native,
    tables,
)
from tests.support.op_results import same_bits

OPTIONAL = {
    "add_rms_norm_": ("hidden", "x_sumsq", "normed_sumsq"),
    "gated_activation_": ("gate_sumsq", "up_sumsq", "out_sumsq"),
    "rotary_": ("q_sumsq", "k_sumsq"),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", FUSED_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_output_left_out_changes_no_other(device: torch.device, kernel: str, op: str, dtype: torch.dtype) -> None:
    run, rows = runs(device, dtype)[op]
    whole = run(kernel, **rows)
    for count in range(1, 4):
        for left_out in itertools.combinations(OPTIONAL[op], count):
            given = dict.fromkeys(name for name in left_out if name != "hidden")
            if "hidden" in left_out:
                x, residual = rows.values()
                normed, (first, second) = blank(x.shape, x), (blank((len(x),), whole.x_sumsq) for _ in range(2))
                arguments = {"x_sumsq": first, "normed_sumsq": second, **given}
                plain = add_rms_norm(kernel, x, residual, rows["x"][0], 1e-5, **given)
                kernel_of(op, kernel)(normed, None, x, residual, rows["x"][0], 1e-5, **arguments)
                assert torch.equal(normed, plain.normed)
                if "x_sumsq" not in left_out:
                    assert torch.equal(first, plain.x_sumsq)
                if "normed_sumsq" not in left_out:
                    assert torch.equal(second, plain.normed_sumsq)
                continue
            result = run(kernel, **rows, **given)
            for name, tensor in whole._asdict().items():
                if name in left_out:
                    assert getattr(result, name).isnan().all()
                else:
                    assert torch.equal(getattr(result, name), tensor), name


@pytest.mark.parametrize("op", FUSED_OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_values_of_the_row_alone(device: torch.device, op: str, dtype: torch.dtype) -> None:
    run, rows = runs(device, dtype)[op]
    whole = run("op", **rows)
    same_bits(run("op", **rows), whole)
    skip_without_native(op, device)
    for row in range(12):
        alone = run("op", **{name: tensor[row : row + 1] for name, tensor in rows.items()})
        for name, tensor in whole._asdict().items():
            assert torch.equal(getattr(alone, name), tensor[row : row + 1]), (name, row)
    many = run("op", **{name: tensor.repeat(200, *[1] * (tensor.dim() - 1)) for name, tensor in rows.items()})
    for name, tensor in whole._asdict().items():
        assert torch.equal(getattr(many, name), tensor.repeat(200, *[1] * (tensor.dim() - 1))), name


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_wide_rows_are_their_own(device: torch.device, dtype: torch.dtype, width: int) -> None:
    skip_without_native("gated_activation_", device)
    like = device, dtype
    x, residual, weight = randn(3, width, like=like), randn(3, width, like=like), randn(width, like=like)
    norms = add_rms_norm("op", x, residual, weight)
    gated = gated_activation("op", x, residual)
    for row in (slice(0, 1), slice(2, 3), slice(1, 3)):
        alone = add_rms_norm("op", x[row], residual[row], weight)
        same_bits(alone, type(norms)(*(tensor[row] for tensor in norms)))
        fused = torch.cat((x[row], residual[row], residual[row]), dim=1)
        alone = gated_activation("op", fused[:, :width], fused[:, width : 2 * width])
        same_bits(alone, type(gated)(*(tensor[row] for tensor in gated)))


@pytest.mark.parametrize("op", FUSED_OPS)
def test_bits_do_not_depend_on_the_number_of_threads(op: str) -> None:
    run, rows = runs(torch.device("cpu"), torch.bfloat16, rows=1200)[op]
    before = torch.get_num_threads()
    expected = run("op", **rows)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            same_bits(run("op", **rows), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_heads_in_a_packed_projection_are_bitwise_identical_to_a_copy(
    device: torch.device, dtype: torch.dtype, weighted: bool
) -> None:
    like = device, dtype
    q, k = heads_of_fused(2, 7, 6, 2, 64, like)
    cos, sin = tables(2, 7, 48, like)
    given: dict[str, Any] = {"q_bias": randn(384, like=like)}
    if weighted:
        given |= {"q_weight": randn(64, like=like), "k_weight": randn(64, like=like), "eps": 1e-6}
    same_bits(rotary("op", q, k, cos, sin, **given), rotary("op", q.contiguous(), k.contiguous(), cos, sin, **given))
